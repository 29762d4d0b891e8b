"""Requests of a core that is stepped by hand, and what a scripted model answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scripted_backend import mixed

from krasis.runtime.serving.api import (
    Request,
)
from krasis.runtime.serving.core import EngineCore
from tests.support.patience import PATIENCE_S


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
    return [list(ticket.events(timeout_s=PATIENCE_S)) for ticket in tickets]
