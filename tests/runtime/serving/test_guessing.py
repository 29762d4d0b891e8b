"""Guesses in the core's steps, over a backend without a model: who gets them, and what becomes of a slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from asking import ask, drained, expected, finish, prompt
from letters import tokens_of
from scripted_backend import ScriptedBackend

from krasis.runtime.serving.api import Finished
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.steps import Limits
from krasis.runtime.settings import SamplingSettings

Make = Callable[..., EngineCore]
EAGER = Limits(pass_rows=4096, company_s=0.0, between_s=0.0, decode_share=0.0)


class Drafts:
    """Guesses right, but for every third guess."""

    count = 3

    def __init__(self, backend: Drafting) -> None:
        self.backend, self.num, self.forgotten = backend, 0, list[int]()

    def propose(self, held: Sequence[int], token: int, count: int, slot: int = 0) -> list[int]:
        assert self.backend.state.tokens[slot] == list(held)  # nothing that was guessed is left in it
        ids = [*map(int, held), token]
        for _ in range(count):
            self.num += 1
            ids.append((self.backend.script(tuple(ids)) + (self.num % 3 == 0)) % self.backend.vocab)
        return ids[len(held) + 1 :]

    def forget(self, slot: int = 0) -> None:
        self.forgotten.append(slot)


class Drafting(ScriptedBackend):
    decodes_between_layers = True

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.drafter = Drafts(self)


def rows_of(backend: ScriptedBackend, length: int) -> list[list[int]]:
    """Rows of each span of the batches that begin behind prompts of that length."""
    return [[one.rows for one in batch.spans] for batch in backend.batches if batch.spans[0].start >= length]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_an_answer_is_the_same_in_fewer_steps(make_core: Make, checkpoints: bool) -> None:
    """checkpoints: a slot then cannot go back over a wrong guess, and what it loses is computed again."""
    backend = Drafting(num_slots=2, checkpoints=checkpoints)
    core = make_core(backend, CoreSettings(num_slots=2))
    (events,) = finish(core, core.submit(ask(prompt(1, 20), 30)))
    assert tokens_of(events) == expected(prompt(1, 20), 30)
    usage = events[-1].usage
    assert (usage.num_generated, core.status().slots[0].num_tokens) == (30, 49)
    assert 0 < usage.num_accepted < usage.num_drafted
    counters = core.status().counters
    assert (counters.num_drafted, counters.num_accepted) == (usage.num_drafted, usage.num_accepted)
    assert 0 < counters.num_drafts <= counters.num_decode_steps == counters.num_decode_rows
    if not checkpoints:
        assert counters.num_decode_steps == 29 - usage.num_accepted
        assert sum(sum(rows) for rows in rows_of(backend, 20)) == counters.num_decode_rows + usage.num_drafted


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_guess_goes_beyond_the_answer_or_the_context(make_core: Make, count: int) -> None:
    for backend, most in ((Drafting(), count), (Drafting(capacity=20 + count - 1), None)):
        core = make_core(backend, CoreSettings(num_slots=1))
        (events,) = finish(core, core.submit(ask(prompt(1, 20), most)))
        assert tokens_of(events) == expected(prompt(1, 20), count)
        assert max([one.end for batch in backend.batches for one in batch.spans]) <= 20 + count - 1


def test_they_are_one_answers_alone(make_core: Make) -> None:
    backend = Drafting(num_slots=3)
    core = make_core(backend, CoreSettings(num_slots=3, limits=EAGER))
    first = core.submit(ask(prompt(1, 20), 60))
    for _ in range(4):
        core.turn(wait=False)
    num_before = len(backend.batches)
    assert any(len(batch.tokens) > 1 for batch in backend.batches[1:])
    second = core.submit(ask(prompt(2, 300), 12))
    while not any(one.rows == 300 for one in backend.batches[-1].spans) and len(backend.batches) < 99:
        core.turn(wait=False)
        if any(len(batch.tokens) == 300 for batch in backend.batches[num_before:]):
            break
    at = next(n for n, batch in enumerate(backend.batches) if len(batch.tokens) == 300)
    both = [drained(first), drained(second)]
    while core.turn(wait=False):
        pass
    events = [[*one, *drained(ticket)] for one, ticket in zip(both, (first, second), strict=True)]
    assert tokens_of(events[0]) == expected(prompt(1, 20), 60)
    assert tokens_of(events[1]) == expected(prompt(2, 300), 12)
    later = backend.batches[at + 1 :]
    between = [batch for batch in later if len(batch.spans) == 1][:1]
    assert [one.rows for one in between[0].spans] == [1]  # between the layers of the second's prompt
    assert all(one.rows == 1 for batch in later if len(batch.spans) > 1 for one in batch.spans)
    assert len(later[-1].tokens) >= 1
    assert any(one.cuts and one.rows > 1 for batch in later for one in batch.spans)  # again alone


def test_a_wrong_row_behind_a_guess_is_computed_alone(make_core: Make) -> None:
    """What is no number behind a guess ends nothing; behind the token itself it does, as ever."""
    backend = Drafting()
    run = backend.run

    def spoilt(batch: object) -> np.ndarray:
        logits = run(batch)  # type: ignore[arg-type]
        logits[1:] = np.nan
        return logits

    backend.run = spoilt  # type: ignore[assignment,method-assign]
    core = make_core(backend, CoreSettings(num_slots=1))
    (events,) = finish(core, core.submit(ask(prompt(1, 20), 9)))
    assert tokens_of(events) == expected(prompt(1, 20), 9)
    assert events[-1].usage.num_drafted > 0 == events[-1].usage.num_accepted


def test_a_drafter_that_breaks_ends_its_request_alone(make_core: Make) -> None:
    backend = Drafting()
    core = make_core(backend, CoreSettings(num_slots=1))
    propose, backend.drafter.propose = backend.drafter.propose, lambda *_: 1 / 0  # type: ignore[method-assign]
    (events,) = finish(core, core.submit(ask(prompt(1, 20), 9)))
    assert not isinstance(events[-1], Finished)
    backend.drafter.propose = propose  # type: ignore[method-assign]
    (events,) = finish(core, core.submit(ask(prompt(1, 20), 9, sampling=SamplingSettings())))
    assert tokens_of(events) == expected(prompt(1, 20), 9)


def test_it_is_told_of_slots_that_are_filled_from_elsewhere(make_core: Make) -> None:
    backend = Drafting(num_slots=1)
    core = make_core(backend, CoreSettings(num_slots=1, cache_bytes=10**8))
    for seed in (1, 2):
        finish(core, core.submit(ask(prompt(seed, 40), 5)))
    assert backend.drafter.forgotten == [0, 0]  # they hold nothing of the slot's
    (events,) = finish(core, core.submit(ask([*prompt(1, 40), 7], 5)))
    assert tokens_of(events) == expected([*prompt(1, 40), 7], 5)
    assert events[-1].usage.num_cached == 40
    assert backend.drafter.forgotten == [0, 0, 0]
