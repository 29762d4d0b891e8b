"""A hub on loopback, with the tiny model under several names, and an empty cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import LoopbackHub, Model


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
    folder = tmp_path / "hf-home"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name, leaf in {
        "HF_HOME": "",
        "HF_HUB_CACHE": "hub",
        "HF_TOKEN_PATH": "token",
        "HF_XET_CACHE": "xet",
        "AGENT_HARNESSES_PATH": ".agent_harnesses.json",
    }.items():
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, os.path.join(folder, leaf))  # noqa: PTH118 -- as the library has it
    return folder
