"""A core in another process: it is the core itself to who asks it, and comes again when it is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import KrasisError, NativeError, ResourceError, UsageError
from krasis.runtime.batch import Batch
from krasis.runtime.server.engine.life import EngineLife
from krasis.runtime.server.engine.remote_core import RemoteCore
from krasis.runtime.server.engine.restarts import Restarts
from krasis.runtime.server.grammar import Grammar, MaskRecipe
from krasis.runtime.serving.api import (
    ContextTooLongError,
    CoreClosedError,
    EngineLostError,
    Failed,
    Finished,
    QueueFullError,
    Request,
)
from tests.support.engine_thread import Engines
from tests.support.letters import text_of, tokens_of
from tests.support.patience import PATIENCE_S
from tests.support.scripted_backend import ScriptedBackend
from tests.support.scripted_core import wait_until

PROMPT = [1, 2, 3, 4]


@pytest.fixture
def engines() -> Iterator[Engines]:
    made = Engines(lambda: ScriptedBackend(token_s=0.001))
    yield made
    made.close()


def ask(core: RemoteCore, num_tokens: int = 8, prompt: list[int] = PROMPT) -> list[object]:
    request = Request(id="x", prompt=prompt, max_tokens=num_tokens, ignore_ends=True)
    return list(core.submit(request).events(PATIENCE_S))


def endless(core: RemoteCore) -> Iterator[object]:
    """An answer under way."""
    events = core.submit(Request(id="long", prompt=PROMPT, ignore_ends=True)).events(PATIENCE_S)
    next(events)
    return events


def test_its_events_are_the_cores_own(engines: Engines) -> None:
    remote = engines.core()
    found = ask(remote)
    local = engines.made[0].core
    expected = list(
        local.submit(Request(id="x", prompt=PROMPT, max_tokens=8, ignore_ends=True)).events(PATIENCE_S)
    )
    assert (text_of(found), tokens_of(found)) == (text_of(expected), tokens_of(expected))
    end = found[-1]
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.num_prompt, end.usage.num_generated) == ("length", 4, 8)
    assert (remote.context, remote.vocab_size, remote.description) == (4096, 64, "scripted")
    assert wait_until(lambda: remote.status().num_running == 0)
    counters = remote.status().counters
    assert (counters.num_requests, dict(counters.num_finished)) == (2, {"length": 2})
    remote.close()
    assert engines.made[0].backend.is_closed
    with pytest.raises(CoreClosedError):
        ask(remote)


def test_what_can_be_known_is_refused_at_once(engines: Engines) -> None:
    def refuse(request: Request) -> None:
        raise UsageError("these stops cannot be met")

    core = engines.core(max_waiting=1, check_text=refuse)
    with pytest.raises(ContextTooLongError) as error:
        ask(core, prompt=[1] * 5000)
    assert (error.value.num_tokens, error.value.context) == (5000, 4096)
    for prompt in ([], [64], [-1], [2**70]):
        with pytest.raises(UsageError):
            ask(core, prompt=prompt)
    with pytest.raises(UsageError, match="stops"):
        core.submit(Request(id="x", prompt=PROMPT, stops=("a",)))
    under_way = [endless(core), endless(core)]
    waiting = core.submit(Request(id="y", prompt=PROMPT))
    with pytest.raises(QueueFullError) as full:
        ask(core)
    assert full.value.retry_after_s >= 1
    waiting.cancel()
    assert isinstance(list(waiting.events(PATIENCE_S))[-1], Finished)
    assert core.status().counters.num_refused == 7
    assert len(under_way) == 2


def test_a_cancelled_answer_ends_there_too(engines: Engines) -> None:
    core = engines.core()
    ticket = core.submit(Request(id="x", prompt=PROMPT, ignore_ends=True))
    events = ticket.events(PATIENCE_S)
    next(events)
    ticket.cancel()
    ticket.cancel()
    assert [*events][-1].reason == "cancelled"  # type: ignore[union-attr]
    assert wait_until(lambda: not any(one.request for one in core.status().slots))


def test_an_engine_that_is_lost_comes_again(engines: Engines) -> None:
    core = engines.core()
    expected = text_of(ask(core))
    before = core.status().counters
    under_way = endless(core)
    begin = time.monotonic()
    engines.made[0].kill()
    last = list(under_way)[-1]
    assert time.monotonic() - begin < 20  # at once; a busy machine takes its time
    assert isinstance(last, Failed)
    assert isinstance(last.error, EngineLostError)
    assert wait_until(lambda: core.trouble() is None)
    assert text_of(ask(core)) == expected
    assert engines.contexts == [None, 4096]
    after = core.status().counters
    assert after.num_restarts == 1
    assert after.num_generated_tokens >= before.num_generated_tokens + 8
    assert after.num_finished["failed"] == 1
    core.close()


def test_while_there_is_none_requests_are_refused(engines: Engines) -> None:
    core = engines.core(pauses_s=(0.0,))
    ask(core)
    gate = threading.Event()
    engines.opening = lambda: gate.wait(PATIENCE_S)
    engines.made[0].kill()
    assert wait_until(lambda: "starts again, attempt 1 of 1" in str(core.trouble()))
    with pytest.raises(EngineLostError, match="killed by a test"):
        ask(core)
    assert core.status().slots  # how many there are is known
    with pytest.raises(EngineLostError):
        core.erase(0)
    gate.set()
    assert wait_until(lambda: core.trouble() is None)
    assert ask(core)


def test_it_is_not_started_for_ever(engines: Engines) -> None:
    core = engines.core()
    ask(core)
    for number in range(2):
        engines.made[number].kill()
        assert wait_until(lambda number=number: len(engines.made) == number + 2 and core.trouble() is None)
    engines.made[2].kill()  # none of them answered anything
    assert str(core._life.wait()) == "the engine ends again and again (got killed by a test)"
    with pytest.raises(CoreClosedError):
        ask(core)


def test_answers_begin_the_count_anew(engines: Engines) -> None:
    core = engines.core(pauses_s=(0.0,))
    for number in range(3):
        assert ask(core)
        engines.made[number].kill()
        assert wait_until(lambda number=number: len(engines.made) == number + 2 and core.trouble() is None)
    assert ask(core)


def test_one_that_cannot_be_opened_again_is_tried_again(engines: Engines) -> None:
    core = engines.core(pauses_s=(0.0, 0.0, 0.0))
    tries: list[int] = []

    def opening() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise ResourceError("there is not enough memory")

    engines.opening = opening
    engines.made[0].kill()
    assert wait_until(lambda: core.trouble() is None and len(tries) == 3)
    assert ask(core)


def test_an_error_that_ends_the_core_is_told_and_the_engine_comes_again(engines: Engines) -> None:
    class _FinalError(NativeError):
        exit_code, is_final = 8, True

    def fail(batch: Batch) -> None:
        raise _FinalError("a rank is lost")

    core = engines.core()
    engines.made[0].backend.before = fail
    last = ask(core)[-1]
    assert isinstance(last, Failed)
    assert "a rank is lost" in str(last.error)
    assert wait_until(lambda: len(engines.made) == 2 and core.trouble() is None)
    assert isinstance(ask(core)[-1], Finished)
    core.close()
    alone = engines.core(pauses_s=None)
    engines.made[2].backend.before = fail
    ask(alone)
    end = alone._life.wait()
    assert end is not None
    assert (end.exit_code, str(end)) == (8, "a rank is lost")


def test_the_first_engines_error_is_the_servers(engines: Engines) -> None:
    def opening() -> None:
        raise ResourceError("there is not enough memory")

    engines.opening = opening
    with pytest.raises(ResourceError, match="memory"):
        engines.core()


def test_an_engine_that_says_nothing_holds_nobody_up(engines: Engines) -> None:
    core = engines.core()
    ask(core)
    held, go_on = threading.Event(), threading.Event()

    def busy(batch: Batch) -> None:
        held.set()
        go_on.wait(PATIENCE_S)

    engine = engines.made[0]
    engine.backend.before = busy
    with engine.core._changed:  # nothing of it answers
        begin = time.monotonic()
        assert core.trouble() is None
        assert core.status().counters.num_requests == 0  # it was never asked before
        ticket = core.submit(Request(id="x", prompt=PROMPT, max_tokens=1))
        assert time.monotonic() - begin < 20  # at once; a busy machine takes its time
    go_on.set()
    assert list(ticket.events(PATIENCE_S))


def test_prompts_longer_than_any_buffer_arrive(engines: Engines) -> None:
    core = engines.core()
    prompt = [number % 63 for number in range(4000)]
    assert isinstance(ask(core, 1, prompt)[-1], Finished)


def test_close_ends_what_is_under_way(engines: Engines) -> None:
    core = engines.core()
    under_way = endless(core)
    core.close()
    core.close()
    last = list(under_way)[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, CoreClosedError)
    assert isinstance(core.trouble(), KrasisError)


def test_close_does_not_wait_for_an_engine_that_loads(engines: Engines) -> None:
    engines.loaded.clear()
    life = EngineLife(engines, Restarts())
    life.begin()
    ended: list[Exception] = []

    def wait_ready() -> None:
        try:
            life.wait_ready()
        except CoreClosedError as error:
            ended.append(error)

    waiting = threading.Thread(target=wait_ready)
    waiting.start()
    assert life.trouble is not None
    life.close()
    waiting.join(PATIENCE_S)
    assert len(ended) == 1
    assert life.wait() is None
    engines.loaded.set()


def test_a_mask_is_made_there_and_one_that_cannot_be_ends_its_request_alone(engines: Engines) -> None:
    class _Only:
        def allowed(self) -> np.ndarray:
            return np.arange(64) == 7

        def accept(self, token: int) -> None:
            pass

    def recipe(grammar: Grammar, closes: tuple[str, ...]) -> Any:
        if grammar.text == "bad":
            raise RuntimeError("no such grammar")
        return _Only

    engines.recipe = recipe
    core = engines.core()

    def asked(text: str) -> list[object]:
        mask = MaskRecipe(Grammar("lark", text, "grammar"), ("x",), None, None)  # type: ignore[arg-type]
        request = Request(id="x", prompt=PROMPT, max_tokens=3, ignore_ends=True, make_mask=mask)
        return list(core.submit(request).events(PATIENCE_S))

    failed = asked("bad")[-1]
    assert isinstance(failed, Failed)
    assert "no such grammar" in str(failed.error)
    assert tokens_of(asked("good")) == [7, 7, 7]


@pytest.mark.parametrize("is_busy", [False, True])
def test_an_engine_whose_server_has_gone_waits_for_a_step_only_so_long(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, is_busy: bool
) -> None:
    monkeypatch.setattr("krasis.runtime.server.engine.host.ORPHAN_S", 0.05)
    core = engines.core()
    engine = engines.made[0]
    held, go_on = threading.Event(), threading.Event()

    def busy(_: Batch) -> None:
        held.set()
        go_on.wait(PATIENCE_S)

    if is_busy:
        engine.backend.before = busy
        core.submit(Request(id="x", prompt=PROMPT))
        assert held.wait(PATIENCE_S)
    engine.channel.abandon()
    if is_busy:
        assert wait_until(lambda: engine.left == [1])
        go_on.set()
    assert wait_until(lambda: engine.backend.is_closed)
    assert engine.left == [1] * is_busy
