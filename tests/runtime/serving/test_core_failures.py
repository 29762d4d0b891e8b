"""What goes wrong around the core: refusals, errors, clients that leave, the end."""

from __future__ import annotations

import gc
import random
import threading
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from asking import ask, expected, finish, prompt
from letters import tokens_of
from scripted_backend import ScriptedBackend

from krasis.formats.errors import KrasisError, NativeError, UsageError
from krasis.runtime.batch import Batch
from krasis.runtime.distributed.errors import RankError
from krasis.runtime.serving.api import (
    ContextTooLongError,
    CoreClosedError,
    Failed,
    Finished,
    QueueFullError,
    Request,
)
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.steps import Limits
from tests.support.patience import PATIENCE_S

MakeCore = Callable[..., EngineCore]


def test_cancelled_while_it_waits_it_is_never_computed(make_core: MakeCore) -> None:
    backend = ScriptedBackend()
    core = make_core(backend)
    ticket = core.submit(ask(prompt(1, 100)))
    ticket.cancel()
    (events,) = finish(core, ticket)
    assert (events[-1].reason, backend.batches) == ("cancelled", [])


def test_cancelled_at_the_next_token(make_core: MakeCore) -> None:
    backend = ScriptedBackend()
    core = make_core(backend)
    ticket = core.submit(ask(prompt(1, 20), 1000))
    for _ in range(10):
        core.turn(wait=False)
    steps = len(backend.batches)
    ticket.cancel()
    (events,) = finish(core, ticket)
    assert (events[-1].reason, len(backend.batches)) == ("cancelled", steps)
    assert len(tokens_of(events)) == events[-1].usage.num_generated == steps


def test_a_thousand_cancels_at_random_lose_no_slot_and_no_memory(make_core: MakeCore) -> None:
    backend = ScriptedBackend(num_slots=3, capacity=200)
    settings = CoreSettings(num_slots=3, cache_bytes=20_000, limits=Limits(pass_rows=64, company_s=0.0))
    core = make_core(backend, settings)
    chance = random.Random(1)

    def storm(count: int) -> None:
        tickets, prompts = [], {}
        for _ in range(count):
            tokens = prompt(chance.randrange(12), chance.randrange(1, 150))
            tickets.append(core.submit(ask(tokens, 12, side=chance.random() < 0.2)))
            prompts[id(tickets[-1])] = tokens
            for _ in range(chance.randrange(4)):
                core.turn(wait=False)
            chance.choice(tickets[-8:]).cancel()
            while core.status().num_waiting > 20:
                core.turn(wait=False)
        for ticket in tickets:
            ticket.cancel()
        for ticket, events in zip(tickets, finish(core, *tickets), strict=True):
            assert events[-1].reason in ("cancelled", "length")
            found = tokens_of(events)
            assert found == expected(prompts[id(ticket)], len(found))
        backend.batches.clear()

    storm(650)
    gc.collect()
    tracemalloc.start()
    storm(100)
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    storm(250)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    status = core.status()
    assert (status.num_running, status.num_waiting) == (0, 0)
    assert [slot.request for slot in status.slots] == ["", "", ""]
    assert backend.state.num_opened == 3
    assert status.store_bytes <= 20_000
    assert after - before < 50_000
    (events,) = finish(core, core.submit(ask(prompt(99, 50))))
    assert tokens_of(events) == expected(prompt(99, 50), 5)


def test_an_error_that_a_backend_does_not_survive_ends_the_core(make_core: MakeCore) -> None:
    """A rank that was killed, say: nothing works any more, and who waits is told at once."""

    def die(batch: Batch) -> None:
        raise RankError("rank 2 ended: killed by SIGKILL")

    backend = ScriptedBackend()
    backend.before = die
    core = make_core(backend)
    tickets = [core.submit(ask(prompt(number, 30))) for number in (1, 2, 3, 4, 5, 6)]
    core.start()
    error = core.wait()
    assert isinstance(error, RankError)
    for ticket in tickets:
        (last,) = [event for event in ticket.events() if isinstance(event, Failed)]
        assert "rank 2 ended" in str(last.error)
    with pytest.raises(CoreClosedError):
        core.submit(ask(prompt(7, 30)))
    core.close()
    assert backend.is_closed


def test_a_backend_error_fails_its_batch_and_nothing_else(make_core: MakeCore) -> None:
    backend = ScriptedBackend()
    core = make_core(backend)
    (before,) = finish(core, core.submit(ask(prompt(1, 50))))

    def refuse(batch: Batch) -> None:
        if len(batch.tokens) > 60:
            raise NativeError("out of memory on the device")

    backend.before = refuse
    (events,) = finish(core, core.submit(ask(prompt(1, 50) + prompt(2, 100))))
    assert isinstance(events[-1], Failed)
    assert "out of memory on the device" in str(events[-1].error)
    backend.before = lambda batch: None
    (events,) = finish(core, core.submit(ask(prompt(1, 50) + tokens_of(before)[:4] + [1, 2])))
    assert tokens_of(events) == expected(prompt(1, 50) + tokens_of(before)[:4] + [1, 2], 5)
    assert events[-1].usage.num_cached >= 49
    assert core.status().counters.num_finished == {"length": 2, "failed": 1}


def test_a_slot_in_doubt_is_closed_and_another_opened(make_core: MakeCore) -> None:
    backend = ScriptedBackend(num_slots=1)
    core = make_core(backend, CoreSettings(num_slots=1))
    run, rewind = backend.run, backend.state.rewind

    def fail(batch: Batch) -> np.ndarray:
        run(batch)
        raise RuntimeError("the device was lost")

    def refuse(slot: int, position: int) -> None:
        raise NativeError("the slot is damaged")

    backend.run, backend.state.rewind = fail, refuse  # type: ignore[method-assign]
    (events,) = finish(core, core.submit(ask(prompt(1, 50))))
    assert isinstance(events[-1], Failed)
    assert "RuntimeError: the device was lost" in str(events[-1].error)
    assert core.status().slots[0].num_tokens == 0
    backend.run, backend.state.rewind = run, rewind  # type: ignore[method-assign]
    (events,) = finish(core, core.submit(ask(prompt(1, 50))))
    assert (tokens_of(events), events[-1].usage.num_cached) == (expected(prompt(1, 50), 5), 0)
    assert backend.state.num_opened == 2


def test_an_error_that_nobody_foresaw_is_one_requests_alone(make_core: MakeCore) -> None:
    class Broken:
        def allowed(self) -> None:
            raise ZeroDivisionError("a fault of the grammar")

        def accept(self, token: int) -> None: ...

    core = make_core(ScriptedBackend())
    bad, good = core.submit(ask(prompt(1, 40), make_mask=Broken)), core.submit(ask(prompt(2, 40)))
    failed, answered = finish(core, bad, good)
    assert isinstance(failed[-1], Failed)
    assert "a fault of the grammar" in str(failed[-1].error)
    assert tokens_of(answered) == expected(prompt(2, 40), 5)


def test_nan_logits_fail_the_request(make_core: MakeCore) -> None:
    backend = ScriptedBackend()
    run = backend.run
    backend.run = lambda batch: run(batch) * np.float32("nan")  # type: ignore[method-assign]
    core = make_core(backend)
    (events,) = finish(core, core.submit(ask([1, 2, 3])))
    assert isinstance(events[-1], Failed)
    assert "NaN" in str(events[-1].error)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (ask([1] * 101), ContextTooLongError, "101 tokens"),
        (ask([]), UsageError, "no tokens"),
        (ask([1, 64]), UsageError, "outside the vocabulary"),
        (ask([1, -1]), UsageError, "outside the vocabulary"),
        (ask([1], logit_bias={64: 1.0}), UsageError, "outside the vocabulary"),
        (ask([1], -1), UsageError, "max_tokens"),
    ],
)
def test_what_is_refused_at_once(make_core: MakeCore, request_: Request, error: type, words: str) -> None:
    core = make_core(ScriptedBackend(capacity=100))
    with pytest.raises(error, match=words):
        core.submit(request_)
    assert core.status().counters.num_refused == 1


def test_a_full_queue_says_when_to_come_again(make_core: MakeCore) -> None:
    core = make_core(ScriptedBackend(), CoreSettings(num_slots=1, max_waiting=2))
    tickets = [core.submit(ask([1, 2, 3])) for _ in range(3)]  # one for the slot, two that wait
    with pytest.raises(QueueFullError) as caught:
        core.submit(ask([1, 2, 3]))
    assert 1 <= caught.value.retry_after_s <= 120
    tickets[1].cancel()
    finish(core, *tickets, core.submit(ask([1, 2, 3])))


def test_closing_ends_every_request(make_core: MakeCore) -> None:
    backend = ScriptedBackend(token_s=0.001)
    core = make_core(backend, CoreSettings(num_slots=2))
    core.start()
    tickets = [core.submit(ask(prompt(seed, 30), 100_000)) for seed in range(4)]
    next(tickets[0].events(PATIENCE_S))
    core.close()
    for ticket in tickets:
        *_, last = ticket.events(PATIENCE_S)
        assert isinstance(last, Failed)
        assert isinstance(last.error, CoreClosedError)
    assert backend.is_closed
    with pytest.raises(CoreClosedError):
        core.submit(ask([1]))
    core.close()


def test_many_threads_ask_and_leave(make_core: MakeCore) -> None:
    core = make_core(ScriptedBackend(num_slots=3), CoreSettings(num_slots=3, cache_bytes=50_000))
    core.start()
    faults: list[object] = []

    def client(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(20):
            tokens = prompt(chance.randrange(6), chance.randrange(1, 120))
            ticket = core.submit(ask(tokens, 10, side=chance.random() < 0.3))
            leaves_after = chance.choice([0, 1, 3, 99])
            events = []
            for event in ticket.events(PATIENCE_S):
                events.append(event)
                if len(events) > leaves_after:
                    ticket.cancel()
            found = tokens_of(events)
            if found != expected(tokens, len(found)) or not isinstance(events[-1], Finished):
                faults.append((tokens, events))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert faults == []
    status = core.status()
    assert (status.num_running, status.num_waiting, status.counters.num_requests) == (0, 0, 160)
    assert sum(status.counters.num_finished.values()) == 160


def test_a_core_closed_as_soon_as_it_is_started(make_core: MakeCore) -> None:
    for _ in range(50):
        backend = ScriptedBackend()
        core = make_core(backend)
        core.start()
        ticket = core.submit(ask([1, 2]))
        core.close()
        assert isinstance(list(ticket.events(PATIENCE_S))[-1], Failed | Finished)
        assert backend.is_closed


def test_slots_that_memory_has_no_room_for_are_done_without(make_core: MakeCore) -> None:
    backend = ScriptedBackend(num_slots=3)
    open_slot = backend.state.open

    def refuse() -> int:
        if backend.state.num_opened == 1:
            raise KrasisError("no memory for another slot")
        return open_slot()

    backend.state.open = refuse  # type: ignore[method-assign]
    core = make_core(backend, CoreSettings(num_slots=3))
    for events, seed in zip(
        finish(core, *(core.submit(ask(prompt(s, 40))) for s in range(3))), range(3), strict=True
    ):
        assert tokens_of(events) == expected(prompt(seed, 40), 5)
    assert len(core.status().slots) == 1


class _Device(ScriptedBackend):
    """Whose batches fail, and which says that it is broken from then on, or not."""

    is_broken = False

    def check(self) -> None:
        if self.is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def close(self) -> None:
        super().close()
        self.check()


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_device_that_is_broken_for_good_ends_the_core(make_core: MakeCore, is_broken: bool) -> None:
    backend = _Device()

    def fail(_: Batch) -> None:
        backend.is_broken = is_broken
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    core = make_core(backend)
    backend.before = fail
    core.start()
    last = list(core.submit(ask(prompt(1, 20))).events(PATIENCE_S))[-1]
    assert isinstance(last, Failed)
    assert "illegal memory access" in str(last.error)
    if is_broken:
        assert "illegal memory access" in str(core.wait())  # though it cannot even close
        assert backend.is_closed
        return
    backend.before = lambda _: None
    assert isinstance(list(core.submit(ask(prompt(1, 20))).events(PATIENCE_S))[-1], Finished)
