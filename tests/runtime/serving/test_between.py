"""Answers under way go on while another's prompt is computed, between its layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from asking import ask, drained, expected, prompt
from letters import text_of, tokens_of
from scripted_backend import ScriptedBackend

from krasis.formats.errors import NativeError
from krasis.runtime.serving.api import Delta, Failed, Finished, Request
from krasis.runtime.serving.between import Between
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.opening import open_core
from krasis.runtime.serving.steps import Limits
from krasis.runtime.settings import EngineSettings, SamplingSettings

Make = Callable[..., EngineCore]
EAGER = Limits(pass_rows=4096, company_s=0.0, between_s=0.0, decode_share=0.0)


class Between2(ScriptedBackend):
    """A backend that can compute single rows between the layers of a batch."""

    decodes_between_layers = True


def ticking() -> Callable[[], float]:
    ticks = itertools.count()
    return lambda: next(ticks) * 0.5


def under_way(core: EngineCore, count: int = 40) -> object:
    """An answer that has its first tokens."""
    ticket = core.submit(ask(prompt(1, 20), count))
    for _ in range(6):
        core.turn(wait=False)
    return ticket


def test_tokens_come_during_a_pass_and_are_those_of_the_answer_alone(make_core: Make) -> None:
    backend = Between2(num_slots=3)
    core = make_core(backend, CoreSettings(num_slots=3, limits=EAGER), clock=ticking())
    first = under_way(core)
    drained(first)
    second = core.submit(ask(prompt(2, 300), 5))
    num_before = len(backend.batches)
    while (
        not backend.batches[num_before:] or max(len(one.tokens) for one in backend.batches[num_before:]) < 300
    ):
        core.turn(wait=False)
    at = next(n for n, one in enumerate(backend.batches) if len(one.tokens) == 300)
    assert [len(one.tokens) for one in backend.batches[at + 1 :]] == [1]  # between its two layers
    assert core.status().counters.num_decode_steps >= 2
    while core.turn(wait=False):
        pass
    for ticket, seed, length, count in ((second, 2, 300, 5),):
        assert tokens_of(drained(ticket)) == expected(prompt(seed, length), count)
    events = drained(first)
    assert isinstance(events[-1], Finished)
    assert tokens_of(events) == expected(prompt(1, 20), 40)[-len(tokens_of(events)) :]


def test_an_error_between_layers_ends_the_answers_and_not_the_pass(make_core: Make) -> None:
    backend = Between2(num_slots=3)
    core = make_core(backend, CoreSettings(num_slots=3, limits=EAGER), clock=ticking())
    first = under_way(core)
    second = core.submit(ask(prompt(2, 300), 5))

    def fails_inside(batch: object) -> None:
        if backend.layer_done is None and any(len(one.tokens) == 300 for one in backend.batches):
            backend.before = lambda _: None
            raise NativeError("it broke")

    backend.before = fails_inside
    while core.turn(wait=False):
        pass
    assert isinstance(drained(first)[-1], Failed)
    assert tokens_of(drained(second)) == expected(prompt(2, 300), 5)


def test_a_backend_that_cannot_is_not_asked(make_core: Make) -> None:
    backend = ScriptedBackend(num_slots=3)
    core = make_core(backend, CoreSettings(num_slots=3, limits=EAGER), clock=ticking())
    under_way(core)
    core.submit(ask(prompt(2, 300), 5))
    while len(backend.batches[-1].tokens) != 300:
        core.turn(wait=False)
    assert len(backend.batches[-1].tokens) == 300


def test_how_often() -> None:
    between = Between(0.25, True)
    between.begin(10.0)
    assert not between.is_due(10.2)
    assert between.is_due(10.25)
    between.stepped(10.3, 10.31)
    assert not between.is_due(10.5)
    assert between.is_due(10.57)
    between.stepped(11.0, 11.17)  # a slow machine's step
    assert not between.is_due(11.46)
    assert between.is_due(11.48)
    between.stepped(12.0, 15.0)
    assert not between.is_due(15.29)
    assert between.is_due(15.31)
    assert between.take_s() == pytest.approx(0.01 + 0.17 + 3.0)
    assert not Between(0.0, False).is_due(1e9)


def test_the_cpu_gives_the_bits_that_each_gets_alone(tiny_bundle: Path) -> None:
    engine = EngineSettings(device="cpu", threads=1, context=1024, prefault=False)
    sampling = SamplingSettings(temperature=0.9, seed=5)
    prompts = [list(range(30, 60)), list(range(100, 108)), [7 * n % 4000 for n in range(600)]]
    texts: list[list[str]] = []
    for limits in (EAGER, None):
        settings = CoreSettings(num_slots=3, limits=limits)
        with open_core(tiny_bundle, engine, settings) as opened:
            requests = [
                Request(id="", prompt=one, max_tokens=60, ignore_ends=True, sampling=sampling)
                for one in prompts
            ]
            if limits is None:  # each alone
                opened.core.start()
                events = [list(opened.core.submit(one).events(60)) for one in requests]
            else:
                tickets = [opened.core.submit(one) for one in requests[:2]]
                while not any(isinstance(one, Delta) for one in drained(tickets[0])):
                    opened.core.turn()
                steps = opened.core.status().counters.num_decode_steps
                tickets = [opened.core.submit(one) for one in requests]
                opened.core.turn()
                while not opened.core.status().counters.num_pass_rows > 600:
                    opened.core.turn()
                assert opened.core.status().counters.num_decode_steps > steps
                while opened.core.turn(wait=False):
                    pass
                events = [drained(ticket) for ticket in tickets]
        texts.append([text_of(one) for one in events])
    assert texts[0] == texts[1]
