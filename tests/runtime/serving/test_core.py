"""The core over a scripted backend: what clients see, and what the backend was asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from asking import ask, drained, expected, finish, prompt
from letters import END, text_of, tokens_of
from scripted_backend import ScriptedBackend, told

from krasis.runtime.batch import Batch
from krasis.runtime.serving.api import (
    Finished,
    Progress,
    Request,
    Usage,
)
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings
from tests.support.patience import PATIENCE_S

MakeCore = Callable[..., EngineCore]


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
    assert len(backend.passes) == 1 + checkpoints  # a short one for the prompt's end
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
        may_go_on.wait(PATIENCE_S)

    core = make_core(backend)
    finish(core, core.submit(ask(prompt(9, 3), 1)))
    backend.batches.clear()
    backend.before = hold
    core.start()
    same = prompt(1, 500)
    first = core.submit(ask(same))
    assert has_begun.wait(PATIENCE_S)
    if is_killed:
        first.cancel()
    again = core.submit(ask(same))
    may_go_on.set()
    assert list(first.events(PATIENCE_S))[-1].reason == ("cancelled" if is_killed else "length")
    events = list(again.events(PATIENCE_S))
    assert tokens_of(events) == expected(same, 5)
    # With checkpoints, the first pass ends before the prompt's last tokens; a killed client asks for no more.
    num_cached = 484 if checkpoints and is_killed else 499
    assert (len(backend.passes), events[-1].usage.num_cached) == (1 + checkpoints, num_cached)


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

        async with asyncio.timeout(PATIENCE_S):
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
