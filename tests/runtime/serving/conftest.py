"""A core over a backend without a model."""

from __future__ import annotations

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
