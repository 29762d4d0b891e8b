"""A hub on loopback, with the tiny model under several names, and an empty cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, Model, use_hub


@pytest.fixture(scope="session")
def gguf_dir(model, tmp_path_factory) -> Path:
    """A repository of GGUFs: two quantisations, and what lies beside them."""
    folder = tmp_path_factory.mktemp("ggufs")
    model.write_gguf(folder / "tiny-q8_0.gguf")
    (folder / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(100))
    (folder / "mmproj-F16.gguf").write_bytes(b"GGUF" + bytes(100))
    return folder


@pytest.fixture
def hub(hf_dir, gguf_dir):
    hub = LoopbackHub()
    hub.models = {"org/tiny": Model(hf_dir), "org/tiny-GGUF": Model(gguf_dir)}
    yield hub
    hub.close()


@pytest.fixture
def cache(hub, tmp_path, monkeypatch) -> Path:
    """The hub's library in this process and in its children works with the loopback hub and this cache."""
    return use_hub(monkeypatch, hub, tmp_path / "hf-home")
