"""Several callers of one engine on the device's double: a prompt cancelled between its layers, answers that
overtake each other, close under a reader."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import UsageError
from krasis.runtime import SamplingSettings
from krasis.runtime.exclusive import CallCancelledError

TOKENS = list(range(40, 90))
WAIT_S = 60.0


@pytest.fixture
def engine(
    chat_bundle: Path,
    open_gpu: Callable[..., Any],
    vram_for: Callable[..., int],
    only_path: Callable[[str], None],
) -> Any:
    only_path("streamed")
    vram_bytes = vram_for(chat_bundle, 128, group_experts=2)
    return open_gpu(chat_bundle, seed=4, context=128, prefill_chunk=32, vram_bytes=vram_bytes)


@pytest.mark.parametrize("at", [1, 33])
def test_a_prompt_is_cancelled_between_layers(engine: Any, at: int) -> None:
    expected = engine.prefill(TOKENS)
    engine.reset()

    def cancel(done: int, total: int) -> None:
        if done >= at:
            engine.cancel()

    with pytest.raises(CallCancelledError):
        engine.prefill(TOKENS, progress=cancel)
    held = engine.tokens
    assert held == tuple(TOKENS[: 32 if at > 32 else 0])
    np.testing.assert_array_equal(engine.prefill(TOKENS[len(held) :]), expected)


def test_the_newest_answer_wins_and_close_waits_for_the_reader(engine: Any) -> None:
    def begin(prompt: str) -> Any:
        return engine.generate(prompt, SamplingSettings(), max_tokens=40)

    older, newer = begin("def main("), begin("import os")
    next(older)
    next(newer)
    with pytest.raises(UsageError, match="another call"):
        next(older)
    errors: list[str] = []

    def read() -> None:
        try:
            for _ in newer:
                begun.set()
        except UsageError as error:
            errors.append(str(error))

    begun = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(WAIT_S)
    engine.close()
    reader.join(WAIT_S)
    assert not reader.is_alive()
    assert "closed" in errors[0]
