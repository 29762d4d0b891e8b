"""A core over a backend without a model, and a tokenizer whose tokens are letters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from scripted_backend import NUM_LAYERS, ScriptedBackend

from krasis.runtime.serving.api import Delta, Request
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings, ModelSide
from krasis.runtime.text.end_tokens import Stops
from krasis.runtime.text.ends import TextEnds
from krasis.runtime.text.thinking import ThinkingSplitter
from krasis.runtime.text.tokenizer import TokenStream

END = 63


class Letters:
    """Id -> letter."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(chr(ord("A") + number) for number in ids)


def ends(request: Request) -> TextEnds:
    """END ends an answer."""
    stream: Any = TokenStream(Letters())  # type: ignore[arg-type]
    return TextEnds(frozenset({END}), Stops(request.stops), stream, ThinkingSplitter())


def text_of(events: Sequence[object]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def tokens_of(events: Sequence[object]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.tokens]


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
