"""What an engine holds after a failure, what it takes for a token, and what a child of fork is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import NativeError, UsageError
from krasis.runtime import Answer, Engine, EngineSettings, SamplingSettings
from krasis.runtime.batch import Batch

PROMPT = "def main("
SETTINGS = EngineSettings(context=256, threads=2, prefill_chunk=64, prefault=False)
WAIT_S = 60.0


@pytest.fixture
def engine(chat_bundle: Path) -> Iterator[Engine]:
    with Engine.open(chat_bundle, SETTINGS) as engine:
        yield engine


def begin(engine: Engine) -> Answer:
    return engine.generate(PROMPT, SamplingSettings(), max_tokens=24)


def text_of(answer: Answer) -> str:
    return "".join(piece.text for piece in answer)


def alone(engine: Engine) -> str:
    text = text_of(begin(engine))
    engine.reset()
    return text


def test_logits_of_decode_are_the_callers_own(engine: Engine) -> None:
    engine.prefill([1, 2, 3])
    first = engine.decode(4)
    before = first.copy()
    engine.decode(5)
    np.testing.assert_array_equal(first, before)


def test_ids_that_are_none_are_refused_by_name(engine: Engine) -> None:
    with pytest.raises(UsageError, match="got -1;"):
        engine.prefill([-1, 5])
    for call, words in (
        (lambda: engine.prefill(np.asarray([1.7])), "got float 1.7"),
        (lambda: engine.prefill([True, 5]), "got bool True"),
        (lambda: engine.prefill(["5"]), "got str '5'"),
        (lambda: engine.prefill(b"abc"), "got bytes"),
        (lambda: engine.decode(1.5), "got float 1.5"),
        (lambda: engine.decode(True), "got bool True"),
        (lambda: engine.decode("a"), "got str 'a'"),
        (lambda: engine.decode(-1), "got -1;"),
    ):
        with pytest.raises(UsageError, match=words):
            call()
    assert engine.tokens == ()
    engine.prefill(np.array([1, 2], np.int32))
    assert engine.decode(np.int64(3)).shape == (300,)
    assert engine.tokens == (1, 2, 3)


@pytest.mark.parametrize("fails_in", ["prefill", "decode"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, NativeError("broken")])
def test_a_failure_inside_leaves_tokens_that_are_true(
    engine: Engine, fails_in: str, error: BaseException | type[BaseException]
) -> None:
    expected = alone(engine)
    backend, inner = engine._backend, engine._backend.run
    calls = []

    def fail(batch: Batch) -> Any:
        result = inner(batch)
        if (len(batch.tokens) == 1) == (fails_in == "decode"):
            calls.append(batch)
            if len(calls) == 2:
                raise error
        return result

    backend.run = fail

    def work() -> None:
        list(begin(engine))
        engine.prefill([1, 2])

    with pytest.raises((KeyboardInterrupt, NativeError)):
        work()
    assert backend.layer_done is None
    backend.run = inner
    held = engine.tokens
    assert text_of(begin(engine)) == expected
    engine.truncate(0)
    whole = engine.prefill(held) if held else None
    engine.reset()
    if whole is not None:
        np.testing.assert_array_equal(engine.prefill(held), whole)


def test_a_child_of_fork_is_told_and_can_leave(engine: Engine) -> None:
    expected = alone(engine)
    answer = begin(engine)
    text = next(answer).text
    child = os.fork()
    if child == 0:
        code = 1
        try:
            refused = 0
            for call in (lambda: engine.prefill([1]), lambda: next(answer), engine.wait_until_read):
                try:
                    call()
                except UsageError as error:
                    refused += "child" in error.what
            engine.close()
            engine._backend.close()  # as its end would do: the pool's threads are not the child's to join
            code = 0 if refused == 3 else 2
        finally:
            os._exit(code)
    end = time.monotonic() + WAIT_S
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    assert status == (child, 0)
    assert text + text_of(answer) == expected
