"""One engine, several callers: threads, answers read in turn, close and cancel at any time."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import UsageError
from krasis.runtime import Answer, Engine, EngineSettings, Message, SamplingSettings
from krasis.runtime.exclusive import CallCancelledError

GREEDY = SamplingSettings()
SETTINGS = EngineSettings(context=1024, threads=2, prefill_chunk=64, prefault=False)
PROMPTS = ("def main(", "import os\n")
LONG = list(range(40, 260)) * 4
WAIT_S = 60.0


@pytest.fixture
def engine(chat_bundle: Path) -> Iterator[Engine]:
    with Engine.open(chat_bundle, SETTINGS) as engine:
        yield engine


def begin(engine: Engine, prompt: str, max_tokens: int = 24) -> Answer:
    return engine.generate(prompt, GREEDY, max_tokens=max_tokens)


def text_of(answer: Answer) -> str:
    return "".join(piece.text for piece in answer)


def alone(engine: Engine, max_tokens: int = 24) -> dict[str, str]:
    """What each prompt gets from an engine of its own."""
    texts = {}
    for prompt in PROMPTS:
        engine.reset()
        texts[prompt] = text_of(begin(engine, prompt, max_tokens))
    engine.reset()
    assert len(set(texts.values())) == 2
    return texts


def test_two_answers_in_turn_never_mix(engine: Engine) -> None:
    expected = alone(engine)
    first, second = (begin(engine, prompt) for prompt in PROMPTS)
    text = next(first).text
    assert expected[PROMPTS[0]].startswith(text)
    other = next(second).text  # the newest wins
    with pytest.raises(UsageError, match="another call has changed what the engine holds"):
        next(first)
    assert list(first) == []
    assert first.stats.stop_reason == "interrupted"
    assert other + text_of(second) == expected[PROMPTS[1]]


@pytest.mark.parametrize(
    "change",
    [
        lambda engine, file: text_of(engine.generate("quick", GREEDY, max_tokens=2)),
        lambda engine, file: engine.reset(),
        lambda engine, file: engine.truncate(1),
        lambda engine, file: engine.prefill([1]),
        lambda engine, file: engine.decode(1),
        lambda engine, file: engine.keep_prefix([1, 2]),
        lambda engine, file: engine.load_prefix(file),
    ],
    ids=["answer", "reset", "truncate", "prefill", "decode", "keep_prefix", "load_prefix"],
)
def test_an_answer_that_was_overtaken_ends(
    engine: Engine, tmp_path: Path, change: Callable[[Engine, Path], Any]
) -> None:
    engine.prefill([5, 6, 7])
    engine.save_prefix(tmp_path / "a.kv")
    answer = begin(engine, PROMPTS[0])
    next(answer)
    change(engine, tmp_path / "a.kv")
    held = engine.tokens
    with pytest.raises(UsageError, match="another call"):
        next(answer)
    assert engine.tokens == held


def test_what_changes_nothing_does_not_end_an_answer(engine: Engine, tmp_path: Path) -> None:
    expected = alone(engine)
    (tmp_path / "bad.kv").write_bytes(b"no prefix")
    answer = begin(engine, PROMPTS[0])
    text = next(answer).text
    engine.save_prefix(tmp_path / "a.kv")
    engine.truncate(len(engine.tokens))
    engine.encode("def")
    begin(engine, PROMPTS[1])  # never read
    for refused in (lambda: engine.prefill([300]), lambda: engine.truncate(999), lambda: engine.decode(-1)):
        with pytest.raises(UsageError):
            refused()
    with pytest.raises(Exception, match=r"bad\.kv"):
        engine.load_prefix(tmp_path / "bad.kv")
    assert text + text_of(answer) == expected[PROMPTS[0]]


def test_a_whole_answer_stays_whole(engine: Engine) -> None:
    """Its last piece was given: nothing of the engine is needed to say that it is over."""
    answer = begin(engine, PROMPTS[0], 3)
    for _ in range(3):
        next(answer)
    engine.reset()
    list(answer)
    assert answer.stats.stop_reason == "length"


def test_threads_get_right_texts_or_are_told(engine: Engine) -> None:
    expected = alone(engine)
    whole: list[str] = []
    errors: list[str] = []

    def ask(prompt: str) -> None:
        for _ in range(12):
            text = ""
            try:
                for piece in begin(engine, prompt):
                    text += piece.text
            except UsageError as error:
                errors.append(str(error))
                whole.append("" if expected[prompt].startswith(text) else text)
            else:
                whole.append(text)

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(ask, prompt) for prompt in PROMPTS * 2]:
            result.result(WAIT_S)
    assert len(whole) == 48
    assert set(whole) <= {"", *expected.values()}
    assert set(whole) != {""}  # the last one to ask had nobody behind it
    assert all("another call" in error for error in errors)


def test_callers_that_take_turns_get_everything(engine: Engine) -> None:
    expected, turn = alone(engine), threading.Lock()

    def ask(prompt: str) -> str:
        with turn:
            return text_of(begin(engine, prompt))

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(asyncio.to_thread(ask, prompt) for prompt in PROMPTS * 5))

    assert asyncio.run(all_of_them()) == [expected[prompt] for prompt in PROMPTS * 5]


def test_two_threads_share_one_answer(engine: Engine) -> None:
    expected = alone(engine)[PROMPTS[0]]
    answer, pieces = begin(engine, PROMPTS[0]), []

    def read() -> None:
        pieces.extend(piece.text for piece in answer)

    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(read), pool.submit(read)]:
            result.result(WAIT_S)
    assert answer.stats.text == expected
    assert sum(map(len, pieces)) == len(expected)


@pytest.mark.parametrize(("end", "reason"), [("close", "interrupted"), ("cancel", "cancelled")])
def test_another_thread_ends_an_answer(engine: Engine, end: str, reason: str) -> None:
    expected = alone(engine, 900)[PROMPTS[0]]
    answer = begin(engine, PROMPTS[0], 900)
    text = next(answer).text
    timer = threading.Timer(0.02, getattr(answer, end))
    timer.start()
    text += text_of(answer)
    timer.join()
    assert answer.stats.stop_reason == reason
    assert len(text) < len(expected)
    assert expected.startswith(text)
    assert text_of(begin(engine, PROMPTS[0], 900)) == expected  # what is held is what is said to be


def slow_layers(engine: Engine, seconds: float) -> None:
    """Makes every layer of a prompt take that long."""

    class Slow:
        def __init__(self, block: Any) -> None:
            self._block = block

        def run(self, *arguments: Any) -> None:
            self._block.run(*arguments)
            time.sleep(seconds)

    for blocks in engine._backend._layers:
        blocks[-1] = Slow(blocks[-1])


@pytest.mark.parametrize(
    "cancel", [lambda engine, _: engine.cancel(), lambda _, answer: answer.cancel()], ids=["engine", "answer"]
)
def test_a_prompt_is_cancelled_between_layers(engine: Engine, cancel: Callable[..., None]) -> None:
    expected = engine.prefill(LONG)
    engine.reset()
    slow_layers(engine, 0.05)  # 14 passes of 2 layers: 1.4 s
    answer = engine.generate(LONG, GREEDY, max_tokens=5)
    timer = threading.Timer(0.12, cancel, (engine, answer))
    timer.start()
    start = time.monotonic()
    assert list(answer) == []
    assert time.monotonic() - start < 0.9
    assert answer.stats.stop_reason == "cancelled"
    slow_layers(engine, 0)
    held = engine.tokens
    assert held == tuple(LONG[: len(held)])
    assert len(held) % 64 == 0
    np.testing.assert_array_equal(engine.prefill(LONG[len(held) :]), expected)


def test_a_cancelled_prefill_says_so(engine: Engine) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 128:
            engine.cancel()

    with pytest.raises(CallCancelledError, match="cancelled"):
        engine.prefill(LONG, progress=stop)
    assert engine.tokens == tuple(LONG[:128])
    engine.cancel()  # nothing is in progress
    engine.prefill([1])
    assert engine._backend.layer_done is None


def test_an_answer_that_waits_behind_a_long_prompt_can_be_cancelled(engine: Engine) -> None:
    slow_layers(engine, 0.02)
    with ThreadPoolExecutor(2) as pool:
        inside = threading.Event()
        long = pool.submit(engine.prefill, LONG, progress=lambda done, total: inside.set())
        assert inside.wait(WAIT_S)
        answer = begin(engine, PROMPTS[0])
        reading = pool.submit(list, answer)
        time.sleep(0.02)
        answer.cancel()
        assert reading.result(WAIT_S) == []
        assert not long.done()
        assert answer.stats.stop_reason == "cancelled"
        engine.cancel()
        with pytest.raises(CallCancelledError):
            long.result(WAIT_S)


def test_close_ends_who_reads_and_waits_for_it(chat_bundle: Path) -> None:
    """Twenty rounds, at another moment each."""
    for round_number in range(20):
        engine = Engine.open(chat_bundle, SETTINGS)
        errors: list[BaseException] = []

        def read(engine: Engine = engine, errors: list[BaseException] = errors) -> None:
            try:
                list(engine.generate([Message("user", "Explain.")], GREEDY, max_tokens=900))
                errors.append(AssertionError("it ended"))
            except UsageError as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.003 * round_number % 0.03)
        closers = [threading.Thread(target=engine.close) for _ in range(2)]
        for closer in closers:
            closer.start()
        for thread in (*closers, reader):
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert "closed" in str(errors[0])
        engine.close()


def test_everything_of_a_closed_engine_is_refused_alike(chat_bundle: Path, tmp_path: Path) -> None:
    engine = Engine.open(chat_bundle, SETTINGS)
    answers = [begin(engine, PROMPTS[0]) for _ in range(3)]
    next(answers[0])
    text_of(whole := begin(engine, PROMPTS[0]))
    answers[1].close()
    engine.close()
    for call in (
        lambda: engine.prefill([1]),
        lambda: engine.decode(1),
        lambda: engine.truncate(0),
        engine.reset,
        lambda: engine.keep_prefix([1]),
        lambda: engine.save_prefix(tmp_path / "a.kv"),
        lambda: engine.load_prefix(tmp_path / "a.kv"),
        lambda: engine.encode("a"),
        lambda: engine.generate("a"),
        engine.wait_until_read,
        lambda: next(answers[0]),
        lambda: next(answers[2]),
        lambda: engine.bundle.asset("tokenizer.json"),
        lambda: engine.bundle.map("embedding"),
        engine.bundle.entries,
    ):
        with pytest.raises(UsageError, match="closed"):
            call()
    assert list(answers[1]) == list(whole) == []
    for harmless in (engine.cancel, engine.close, answers[0].close, answers[2].cancel):
        harmless()
    assert isinstance(engine.tokens, tuple)
    assert engine.huge_page_share is None


def test_a_callback_cannot_call_the_engine(engine: Engine) -> None:
    answer = begin(engine, PROMPTS[1])
    errors = []

    def nest(done: int, total: int) -> None:
        for call in (engine.close, engine.reset, lambda: engine.decode(1), lambda: next(answer)):
            with pytest.raises(UsageError, match="middle of a call") as caught:
                call()
            errors.append(caught.value)

    engine.prefill([1, 2, 3], progress=nest)
    assert len(errors) >= 4
    assert len(engine.tokens) == 3
    list(answer)


def test_an_answer_in_the_garbage_ends_in_whatever_thread_collects_it(engine: Engine) -> None:
    expected = alone(engine)
    answer = begin(engine, PROMPTS[0])
    next(answer)
    cycle: list[object] = [answer]
    cycle.append(cycle)
    del answer, cycle

    def collect(done: int, total: int) -> None:
        gc.collect()

    engine.prefill([1], progress=collect)
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join(WAIT_S)
    assert text_of(begin(engine, PROMPTS[1])) == expected[PROMPTS[1]]
