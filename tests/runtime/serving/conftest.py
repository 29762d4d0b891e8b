"""A core over a backend without a model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from letters import ends
from scripted_backend import NUM_LAYERS, ScriptedBackend

from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings, ModelSide


@pytest.fixture
def make_core() -> Iterator[Callable[..., EngineCore]]:
    """(backend, settings, **of the core) -> a core, closed at the end."""
    cores: list[EngineCore] = []

    def make(backend: ScriptedBackend, settings: CoreSettings | None = None, **options: Any) -> EngineCore:
        core = EngineCore(backend, ModelSide(backend.vocab, NUM_LAYERS, ends), settings, **options)
        cores.append(core)
        return core

    yield make
    for core in cores:
        core.close()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed model as a bundle for the CPU."""
    path = tmp_path_factory.mktemp("serving") / "tiny.krasis"
    code = "from krasis.convert.cli import main; main()"
    source = Path(__file__).parents[2] / "assets" / "tiny-qwen3-moe"
    command = [sys.executable, "-c", code, source, "-o", path, "--tiers", "cpu", "--quiet"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    return path
