"""The core over a scripted backend: what clients see, and what the backend was asked."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from letters import END, text_of, tokens_of
from scripted_backend import ScriptedBackend, mixed, told

from krasis.formats.errors import KrasisError, NativeError, UsageError
from krasis.runtime.batch import Batch
from krasis.runtime.serving.api import (
    ContextTooLongError,
    CoreClosedError,
    Failed,
    Finished,
    Progress,
    PromptScores,
    QueueFullError,
    Request,
    Usage,
)
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.steps import Limits
from krasis.runtime.settings import SamplingSettings

MakeCore = Callable[..., EngineCore]


def prompt(seed: int, length: int, vocab: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def expected(tokens: Sequence[int], count: int, vocab: int = 64) -> list[int]:
    """What the scripted model says alone."""
    script, ids = mixed(vocab), list(tokens)
    for _ in range(count):
        ids.append(script(tuple(ids)))
    return ids[len(tokens) :]


def ask(tokens: Sequence[int], count: int = 5, **options: Any) -> Request:
    return Request(id="r", prompt=tokens, max_tokens=count, ignore_ends=True, **options)


def drained(ticket: Any) -> list[Any]:
    """The events that are there already."""
    events = []
    try:
        for event in ticket.events(timeout_s=0):
            events.append(event)  # noqa: PERF402  what came before the time-out counts
    except TimeoutError:
        pass
    return events


def finish(core: EngineCore, *tickets: Any) -> list[list[Any]]:
    """Turns till all are over; each one's events."""
    while core.turn(wait=False) or core.status().num_running or core.status().num_waiting:
        pass
    return [list(ticket.events(timeout_s=5)) for ticket in tickets]


def test_an_answer_with_its_usage(make_core: MakeCore) -> None:
    backend = ScriptedBackend(told({(1, 2, 3): [7, 4, 11, 11, 14, END]}))
    core = make_core(backend)
    (events,) = finish(core, core.submit(Request(id="hello", prompt=[1, 2, 3])))
    assert text_of(events) == "HELLO"
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.usage) == ("end", Usage(3, 0, 6, 0))
    assert [event.num_processed for event in events if isinstance(event, Progress)][-1] == 3


@pytest.mark.parametrize(
    ("options", "reason", "stop", "text"),
    [
        ({"max_tokens": 2}, "length", "", "HE"),
        ({"max_tokens": 0}, "length", "", ""),
        ({"stops": ("LO",)}, "stop", "LO", "HEL"),
        ({"stops": ("XX", "ELL")}, "stop", "ELL", "H"),
        ({}, "end", "", "HELLO"),
    ],
)
def test_how_answers_end(make_core: MakeCore, options: Any, reason: str, stop: str, text: str) -> None:
    core = make_core(ScriptedBackend(told({(1, 2): [7, 4, 11, 11, 14, END]})))
    (events,) = finish(core, core.submit(Request(id="x", prompt=[1, 2], **options)))
    assert text_of(events) == text
    assert (events[-1].reason, events[-1].stop) == (reason, stop)


def test_a_full_context_ends_an_answer(make_core: MakeCore) -> None:
    core = make_core(ScriptedBackend(capacity=10))
    (events,) = finish(core, core.submit(Request(id="x", prompt=[1] * 8, ignore_ends=True)))
    assert (events[-1].reason, len(tokens_of(events))) == ("context", 3)


def test_clients_together_get_what_each_gets_alone(make_core: MakeCore) -> None:
    backend = ScriptedBackend(num_slots=3)
    core = make_core(backend, CoreSettings(num_slots=3, cache_bytes=10**6))
    prompts = [prompt(seed, 10 + 17 * seed) for seed in range(8)]
    all_events = finish(core, *(core.submit(ask(one, 9)) for one in prompts))
    for one, events in zip(prompts, all_events, strict=True):
        assert tokens_of(events) == expected(one, 9)
        assert events[-1].reason == "length"


def test_prompts_sent_together_take_one_pass(make_core: MakeCore) -> None:
    backend = ScriptedBackend()
    core = make_core(backend)
    finish(core, *(core.submit(ask(prompt(seed, 100))) for seed in range(4)))
    counters = core.status().counters
    assert (counters.num_passes, counters.num_shared_passes, counters.num_pass_rows) == (1, 1, 400)
    assert (counters.num_decode_steps, counters.num_decode_rows) == (4, 16)
    assert (counters.num_requests, counters.num_generated_tokens) == (4, 20)
    assert counters.num_finished == {"length": 4}


@pytest.mark.parametrize("checkpoints", [False, True])
def test_identical_prompts_cost_one_pass_in_all(make_core: MakeCore, checkpoints: bool) -> None:
    backend = ScriptedBackend(checkpoints=checkpoints)
    core = make_core(backend)
    finish(core, core.submit(ask(prompt(9, 3), 1)))  # now it is known how state can be cut
    backend.batches.clear()
    same = prompt(1, 200)
    events = finish(core, *(core.submit(ask(same)) for _ in range(4)))
    assert [tokens_of(one) for one in events] == [expected(same, 5)] * 4
    assert len(backend.passes) == 1
    assert core.status().counters.num_joined == 3
    assert [one[-1].usage.num_cached for one in events] == [0, 199, 199, 199]


@pytest.mark.parametrize(("num_slots", "cache_bytes"), [(2, 0), (1, 10**6)])
def test_the_second_turn_finds_the_first_and_a_title_in_between_takes_nothing(
    make_core: MakeCore, num_slots: int, cache_bytes: int
) -> None:
    backend = ScriptedBackend(num_slots=num_slots)
    core = make_core(backend, CoreSettings(num_slots=num_slots, cache_bytes=cache_bytes))
    first = prompt(1, 400)
    (events,) = finish(core, core.submit(ask(first, 20)))
    for seed in (2, 3):
        finish(core, core.submit(ask(first + prompt(seed, 30), 3, side=True)))
    second = first + tokens_of(events) + prompt(4, 50)
    (events,) = finish(core, core.submit(ask(second, 5)))
    assert tokens_of(events) == expected(second, 5)
    assert events[-1].usage.num_cached == 419  # the last token of an answer is shown, and never computed
    assert [sum(span.rows for span in batch.spans) for batch in backend.passes] == [400, 30, 30, 51]
    counters = core.status().counters
    assert (counters.num_prefix_queries, counters.num_prefix_hits) == (400 + 430 + 430 + 470, 400 + 400 + 419)


def test_more_conversations_than_slots(make_core: MakeCore) -> None:
    backend = ScriptedBackend(num_slots=2)
    core = make_core(backend, CoreSettings(num_slots=2, cache_bytes=10**6))
    talks = [prompt(seed, 300) for seed in range(6)]
    for turn in range(3):
        for number, talk in enumerate(talks):
            (events,) = finish(core, core.submit(ask(talk, 10)))
            assert tokens_of(events) == expected(talk, 10)
            assert events[-1].usage.num_cached >= 0.85 * len(talk) * (turn > 0)
            talks[number] = talk + tokens_of(events) + prompt(100 * turn + number, 40)
    counters = core.status().counters
    assert counters.num_restored >= 10
    assert counters.num_prefix_hits > 0.5 * counters.num_prefix_queries


def test_without_room_in_ram_prompts_are_computed_again(make_core: MakeCore) -> None:
    backend = ScriptedBackend(num_slots=1)
    core = make_core(backend, CoreSettings(num_slots=1, cache_bytes=0))
    for seed in (1, 2, 1):
        (events,) = finish(core, core.submit(ask(prompt(seed, 100), 3)))
        assert tokens_of(events) == expected(prompt(seed, 100), 3)
        assert events[-1].usage.num_cached == 0


def test_state_that_cannot_be_cut_anywhere_gives_the_same_answers(make_core: MakeCore) -> None:
    backend = ScriptedBackend(num_slots=2, checkpoints=True)
    core = make_core(backend, CoreSettings(num_slots=2, cache_bytes=10**6))
    talks = [prompt(seed, 200) for seed in range(4)]
    for turn in range(3):
        for number, talk in enumerate(talks):
            (events,) = finish(core, core.submit(ask(talk, 6)))
            assert tokens_of(events) == expected(talk, 6)
            if turn and number:
                assert events[-1].usage.num_cached >= 0.8 * len(talk)
            talks[number] = talk + tokens_of(events)[: 6 - turn] + prompt(50 * turn + number, 20)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("is_killed", [True, False])
def test_who_asks_the_same_during_a_pass_waits_for_it_even_if_its_client_is_gone(
    make_core: MakeCore, is_killed: bool, checkpoints: bool
) -> None:
    backend = ScriptedBackend(checkpoints=checkpoints)
    has_begun, may_go_on = threading.Event(), threading.Event()

    def hold(_: Batch) -> None:
        has_begun.set()
        may_go_on.wait(10)

    core = make_core(backend)
    finish(core, core.submit(ask(prompt(9, 3), 1)))
    backend.batches.clear()
    backend.before = hold
    core.start()
    same = prompt(1, 500)
    first = core.submit(ask(same))
    assert has_begun.wait(10)
    if is_killed:
        first.cancel()
    again = core.submit(ask(same))
    may_go_on.set()
    assert list(first.events(5))[-1].reason == ("cancelled" if is_killed else "length")
    events = list(again.events(5))
    assert tokens_of(events) == expected(same, 5)
    assert (len(backend.passes), events[-1].usage.num_cached) == (1, 499)


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
    next(tickets[0].events(5))
    core.close()
    for ticket in tickets:
        *_, last = ticket.events(5)
        assert isinstance(last, Failed)
        assert isinstance(last.error, CoreClosedError)
    assert backend.is_closed
    with pytest.raises(CoreClosedError):
        core.submit(ask([1]))
    core.close()


def test_scores_of_the_prompt_and_of_the_answer(make_core: MakeCore) -> None:
    core = make_core(ScriptedBackend(told({(1, 2, 3): [5, 6]})), CoreSettings(limits=Limits(pass_rows=2)))
    finish(core, core.submit(ask([1, 2, 3])))
    (events,) = finish(core, core.submit(ask([1, 2, 3], 2, logprobs=2, prompt_logprobs=1)))
    # Every row of logits is -|id - script|: exp sums over 64 ids.
    script = told({(1, 2, 3): [5, 6]})

    def score(tokens: tuple[int, ...], token: int) -> float:
        row = -np.abs(np.arange(64) - script(tokens)).astype(float)
        return float(row[token] - np.log(np.exp(row).sum()))

    (found,) = [event for event in events if isinstance(event, PromptScores)]
    assert found.scores[0] is None
    assert [one.token for one in found.scores[1:] if one] == [2, 3]
    assert [one.logprob for one in found.scores[1:] if one] == pytest.approx(
        [score((1,), 2), score((1, 2), 3)]
    )
    assert [one.rank for one in found.scores[1:] if one] == [3, 4]
    answer = [one for event in events if (one := getattr(event, "scores", None)) and event is not found]
    assert [(one.token, one.rank) for (one,) in answer] == [(5, 1), (6, 1)]
    assert [one.logprob for (one,) in answer] == pytest.approx([score((1, 2, 3), 5), score((1, 2, 3, 5), 6)])
    assert [[token for token, _ in one.top] for (one,) in answer] == [[5, 4], [6, 5]]
    assert events[-1].usage.num_cached == 0


def test_bias_and_mask(make_core: MakeCore) -> None:
    class Even:
        """Even tokens only; what was picked is told."""

        def __init__(self) -> None:
            self.picked: list[int] = []

        def allowed(self) -> np.ndarray:
            return np.arange(80) % 2 == 0

        def accept(self, token: int) -> None:
            self.picked.append(token)

    core = make_core(ScriptedBackend(told({}, otherwise=7)))
    mask = Even()
    masked, biased = finish(
        core,
        core.submit(ask([1], 3, make_mask=lambda: mask)),
        core.submit(ask([2], 3, logit_bias={7: -100.0, 9: 1.5})),
    )
    assert tokens_of(masked) == mask.picked == [6, 6, 6]
    assert tokens_of(biased) == [9, 9, 9]


def test_a_mask_that_allows_nothing_is_an_error_of_its_request(make_core: MakeCore) -> None:
    class Nothing:
        def allowed(self) -> np.ndarray:
            return np.zeros(64, dtype=np.bool_)

        def accept(self, token: int) -> None: ...

    core = make_core(ScriptedBackend())
    (events,) = finish(core, core.submit(ask([1], make_mask=Nothing)))
    assert isinstance(events[-1], Failed)
    assert "allows no token" in str(events[-1].error)


def test_a_seed_gives_the_same_answer_in_any_company(make_core: MakeCore) -> None:
    sampling = SamplingSettings(temperature=3.0, seed=5)
    core = make_core(ScriptedBackend())
    (alone,) = finish(core, core.submit(ask([1, 2], 20, sampling=sampling)))
    many = finish(
        core, *(core.submit(ask([1, 2], 20, sampling=sampling)) for _ in range(2)), core.submit(ask([3], 20))
    )
    assert [tokens_of(one) for one in many[:2]] == [tokens_of(alone)] * 2


def test_events_for_a_loop_and_a_cancel_from_it(make_core: MakeCore) -> None:
    core = make_core(ScriptedBackend(token_s=0.001))
    core.start()

    async def read() -> tuple[list[Any], list[Any]]:
        one, other = core.submit(ask(prompt(1, 30), 20)), core.submit(ask(prompt(2, 30), 100_000))

        async def all_of(ticket: Any, most: int) -> list[Any]:
            events = []
            async for event in ticket.async_events():
                events.append(event)
                if len(events) == most:
                    ticket.cancel()
            return events

        async with asyncio.timeout(20):
            return await asyncio.gather(all_of(one, -1), all_of(other, 10))

    one, other = asyncio.run(read())
    assert tokens_of(one) == expected(prompt(1, 30), 20)
    assert other[-1].reason == "cancelled"


def test_progress_is_said_during_a_pass(make_core: MakeCore) -> None:
    seconds = iter(range(10**6))
    seen: list[Any] = []

    def script(_: tuple[int, ...]) -> int:  # called when a pass is behind its layers
        seen.extend(drained(ticket))
        return 1

    core = make_core(ScriptedBackend(script), clock=lambda: float(next(seconds)))
    ticket = core.submit(ask(prompt(1, 100), 2))
    core.turn(wait=False)
    seen += drained(ticket)
    while core.turn(wait=False) or core.status().num_running:
        seen += drained(ticket)
    said = [event for event in seen if isinstance(event, Progress)]
    # With its slot, after layers of the pass (what is not read is overtaken), and when all is in place.
    assert [one.num_processed for one in said] == [0, 100, 100]
    assert [one.elapsed_s for one in said] == sorted(one.elapsed_s for one in said)
    assert isinstance(seen[-1], Finished)


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
            for event in ticket.events(30):
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
        thread.join(60)
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
        assert isinstance(list(ticket.events(5))[-1], Failed | Finished)
        assert backend.is_closed


def test_no_more_answers_than_rows_of_a_batch(make_core: MakeCore) -> None:
    backend = ScriptedBackend(prefill_chunk=2)
    core = make_core(backend)
    for seed, events in enumerate(finish(core, *(core.submit(ask(prompt(s, 7))) for s in range(4)))):
        assert tokens_of(events) == expected(prompt(seed, 7), 5)
    assert max(len(batch.tokens) for batch in backend.batches) == 2


def test_no_event_in_time_is_said_and_reading_goes_on(make_core: MakeCore) -> None:
    core = make_core(ScriptedBackend())
    ticket = core.submit(ask([1, 2, 3], 2))
    with pytest.raises(TimeoutError):
        next(ticket.events(timeout_s=0.01))
    assert len(tokens_of(finish(core, ticket)[0])) == 2


def test_what_was_not_to_be_kept_is_not_found(make_core: MakeCore) -> None:
    core = make_core(ScriptedBackend())
    for _ in range(2):
        (events,) = finish(core, core.submit(ask(prompt(1, 100), use_cache=False)))
        assert (tokens_of(events), events[-1].usage.num_cached) == (expected(prompt(1, 100), 5), 0)
    assert all(slot.num_tokens == 0 for slot in core.status().slots)


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
