#!/usr/bin/env python3
"""Several callers of one Engine, at random: whole answers, answers read in turn or by another thread, close,
cancel, reset, saved prefixes, asyncio, children of fork, and the engine closed under all of them.

Every text must be what one caller alone gets for its prompt, or, where the answer was ended or overtaken, the
beginning of it. Exit code 1 for any other text, error or a standstill; a crash speaks for itself. Example:

    python -m scripts.stress_engine model.krasis --minutes 10 --threads 4
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from krasis.formats.errors import UsageError
from krasis.runtime import Answer, Engine, EngineSettings, SamplingSettings
from krasis.runtime.engine import Prompt
from krasis.runtime.exclusive import CallCancelledError
from krasis.runtime.text.chat import Message

STANDSTILL_S = 120.0
WINDOW_S = 1.0  # so long callers take turns by themselves, and so long they do not
CHILD_S = 30.0
EXPECTED = (
    "this answer cannot go on",
    "the engine is closed",
    "the bundle is closed",  # while a prompt was being encoded
    "cannot keep more tokens",
    "there is nothing to save",
    "the context is full",  # tokens that others put there
)
WHOLE = ("end", "stop", "length", "context")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and how it is to be answered."""

    prompt: Prompt
    sampling: SamplingSettings
    max_tokens: int


LINES = "".join(f"def number_{i}(value):\n    return value + {i}\n" for i in range(40))
QUESTIONS = [
    Question("def main(", SamplingSettings(), 40),
    Question("import os\nimport sys\n", SamplingSettings(), 30),
    Question([Message("user", "Explain the if statement in Python.")], SamplingSettings(), 30),
    Question([Message("user", "Explain the del statement in Python.")], SamplingSettings(), 30),
    Question("class Tree:\n", SamplingSettings(temperature=0.8, seed=5), 30),
    Question("def main(args):\n", SamplingSettings(repetition_penalty=1.2), 30),
    Question(LINES, SamplingSettings(), 5),  # several passes
]


class Stress:
    """What the callers share. failures: what went wrong, one text each."""

    def __init__(self, bundle: Path, settings: EngineSettings, folder: Path, seed: int) -> None:
        self.bundle, self.settings, self.folder, self.seed = bundle, settings, folder, seed
        self._engine = Engine.open(bundle, settings)
        self.turns = threading.Lock()
        self.failures: list[str] = []
        self.done: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self._opening = threading.Lock()
        self._noting = threading.Lock()
        self.references = [self._alone(question) for question in QUESTIONS]

    @property
    def engine(self) -> Engine:
        """The one that all use."""
        with self._opening:
            return self._engine

    def _alone(self, question: Question) -> str:
        self.engine.reset()
        return "".join(piece.text for piece in self.ask(question))

    def ask(self, question: Question) -> Answer:
        """A fresh answer."""
        return self.engine.generate(question.prompt, question.sampling, max_tokens=question.max_tokens)

    def replace_engine(self) -> None:
        """Closes the engine that all use, and opens another."""
        with self._opening:
            self._engine.close()
            self._engine.close()
            self._engine = Engine.open(self.bundle, self.settings)

    def fail(self, text: str) -> None:
        """Notes what went wrong."""
        with self._noting:
            self.failures.append(text)

    def count(self, action: str, end: str = "") -> None:
        """Notes that something was done."""
        with self._noting:
            self.done[action] += 1
            if end:
                self.ends[end] += 1


class Caller:
    """One thread's share: random actions until the time is over."""

    def __init__(self, stress: Stress, number: int) -> None:
        self._stress = stress
        self._random = random.Random(stress.seed * 1000 + number)
        self._file = stress.folder / f"{number}.kv"
        self._actions: list[tuple[int, Callable[[], None]]] = [
            (30, self.read_one),
            (15, self.read_in_turn),
            (12, self.end_from_another_thread),
            (6, self.drop),
            (6, self.compute),
            (6, self.change),
            (4, self.save_and_load),
            (6, self.read_in_asyncio),
            (4, self.cancel_engine),
            (1, self.replace),
            (1, self.fork),
        ]
        self._rude = (self.cancel_engine, self.replace, self.fork)

    def run(self, deadline: float) -> None:
        """Until the deadline or the first failure of anybody."""
        weights = [weight for weight, _ in self._actions]
        while time.monotonic() < deadline and not self._stress.failures:
            (_, action) = self._random.choices(self._actions, weights)[0]
            is_polite = int(time.monotonic() / WINDOW_S) % 2 and action not in self._rude
            try:
                with self._stress.turns if is_polite else contextlib.nullcontext():
                    action()
                self._stress.count(action.__name__)
            except UsageError as error:
                if not error.what.startswith(EXPECTED):
                    self._stress.fail(f"{action.__name__}: {traceback.format_exc()}")
                self._stress.count(action.__name__, error.what)
            except CallCancelledError:
                self._stress.count(action.__name__, "a call cancelled")
            except BaseException:  # noqa: BLE001  whatever it is, it is what is looked for
                self._stress.fail(f"{action.__name__}: {traceback.format_exc()}")

    def _pick(self) -> int:
        return self._random.randrange(len(QUESTIONS))

    def _check(self, index: int, text: str, answer: Answer | None) -> None:
        """answer: None if it was overtaken."""
        expected = self._stress.references[index]
        reason = "overtaken or closed" if answer is None else answer.stats.stop_reason
        self._stress.count("answers", reason)
        right = text == expected if reason in WHOLE else expected.startswith(text)
        if not right or not reason:
            self._stress.fail(f"question {index}, ended by {reason!r}: {text!r} instead of {expected!r}")

    def _read(self, index: int, answer: Answer) -> None:
        text = ""
        try:
            for piece in answer:
                text += piece.text
        except UsageError as error:
            if not error.what.startswith(EXPECTED):
                raise
            self._check(index, text, None)
        else:
            self._check(index, text, answer)

    def read_one(self) -> None:
        """One answer from beginning to end."""
        index = self._pick()
        self._read(index, self._stress.ask(QUESTIONS[index]))

    def read_in_turn(self) -> None:
        """Two answers, a piece of each."""
        indexes = [self._pick(), self._pick()]
        answers = [self._stress.ask(QUESTIONS[index]) for index in indexes]
        texts = ["", ""]
        open_ones = {0, 1}
        while open_ones:
            one = self._random.choice(sorted(open_ones))
            try:
                texts[one] += next(answers[one]).text
            except StopIteration:
                open_ones.remove(one)
                self._check(indexes[one], texts[one], answers[one])
            except UsageError as error:
                if not error.what.startswith(EXPECTED):
                    raise
                open_ones.remove(one)
                self._check(indexes[one], texts[one], None)

    def end_from_another_thread(self) -> None:
        """close or cancel while this thread reads."""
        index = self._pick()
        answer = self._stress.ask(QUESTIONS[index])
        end = self._random.choice((answer.close, answer.cancel))
        timer = threading.Timer(self._random.random() * 0.02, end)
        timer.start()
        try:
            self._read(index, answer)
        finally:
            timer.join()

    def drop(self) -> None:
        """An answer that nobody reads on; another thread finds it in the garbage."""
        answers = [self._stress.ask(QUESTIONS[self._pick()])]
        with contextlib.suppress(StopIteration):
            next(answers[0])
        cycle: list[object] = [answers.pop()]
        cycle.append(cycle)
        del cycle
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()

    def compute(self) -> None:
        """Logits without text."""
        engine = self._stress.engine
        held = engine.tokens
        if len(held) + 8 < engine.context:
            engine.prefill([1, 2, 3], all_logits=self._random.random() < 0.5)
            if engine.decode(4).shape != (engine.bundle.spec.vocab,):
                self._stress.fail("logits of another shape")

    def change(self) -> None:
        """What is held, cut or forgotten."""
        engine = self._stress.engine
        if self._random.random() < 0.5:
            engine.reset()
        else:
            engine.truncate(self._random.randrange(20))

    def save_and_load(self) -> None:
        """A prefix through a file."""
        engine = self._stress.engine
        engine.save_prefix(self._file, conversation=b"hello")
        if engine.load_prefix(self._file) != b"hello":
            self._stress.fail("another conversation came back")

    def read_in_asyncio(self) -> None:
        """Two tasks of an event loop; one of them is cancelled."""

        async def both() -> None:
            indexes = [self._pick(), self._pick()]
            answers = [self._stress.ask(QUESTIONS[index]) for index in indexes]
            tasks = [
                asyncio.create_task(asyncio.to_thread(self._read, index, answer))
                for index, answer in zip(indexes, answers, strict=True)
            ]
            await asyncio.sleep(self._random.random() * 0.02)
            tasks[0].cancel()
            answers[0].cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result

        asyncio.run(both())

    def cancel_engine(self) -> None:
        """Whatever is in progress."""
        self._stress.engine.cancel()

    def replace(self) -> None:
        """The engine closed under everybody."""
        self._stress.replace_engine()

    def fork(self) -> None:
        """A child that uses its parent's engine is refused, and leaves."""
        engine = self._stress.engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: that is the point
            child = os.fork()
        if child == 0:
            code = 1
            try:
                engine.prefill([1])
            except UsageError as error:
                engine.close()
                code = 0 if "process" in error.what or "closed" in error.what else 2
            finally:
                os._exit(code)
        end = time.monotonic() + CHILD_S
        while time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                if status:
                    self._stress.fail(f"a child ended with {status}")
                return
            time.sleep(0.005)
        os.kill(child, 9)
        os.waitpid(child, 0)
        self._stress.fail("a child hangs")


def stress(bundle: Path, seconds: float, num_threads: int, seed: int, engine_threads: int) -> Stress:
    """Runs the callers; the result's failures are empty if all was right."""
    settings = EngineSettings(context=2048, threads=engine_threads, prefill_chunk=64, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        shared = Stress(bundle, settings, Path(folder), seed)
        deadline = time.monotonic() + seconds
        callers = [Caller(shared, number) for number in range(num_threads)]
        threads = [threading.Thread(target=caller.run, args=(deadline,)) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shared.engine.close()
    return shared


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--minutes", type=float, default=1.0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=4, show_default=True, help="Callers.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--engine-threads", type=click.IntRange(1), default=2, show_default=True, help="Of the kernels."
)
def main(bundle: Path, minutes: float, threads: int, seed: int, engine_threads: int) -> None:
    """Prints what was done and how answers ended; fails at the first thing that is wrong."""
    faulthandler.dump_traceback_later(minutes * 60 + STANDSTILL_S, exit=True)
    result = stress(bundle, minutes * 60, threads, seed, engine_threads)
    for title, counts in (("done", result.done), ("ends", result.ends)):
        click.echo(f"{title}: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()))
    for failure in result.failures:
        click.echo(f"FAILED: {failure}", err=True)
    click.echo(f"{len(result.failures)} failures")
    sys.exit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
