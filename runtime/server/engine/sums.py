"""Figures of engines that came one after the other: none ever falls, though each begins at zero."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from threading import Lock
from typing import Any

from krasis.runtime.serving.api import CoreStatus, Counters, SlotStatus

_SUMS = tuple(one.name for one in fields(Counters) if one.name != "num_finished")


class Sums:
    """Any thread may call."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._before = Counters()  # of all engines but the one that is there, and of the server itself
        self._last = CoreStatus(0, 0, (), 0.0, 0, 0, Counters())

    def begin(self, num_slots: int) -> None:
        """An engine is ready, and nothing is known of it yet."""
        slots = tuple(SlotStatus(number, 0, "") for number in range(num_slots))
        with self._lock:
            self._last = CoreStatus(0, 0, slots, 0.0, 0, 0, Counters())

    def note(self, status: CoreStatus) -> None:
        """What the engine says of itself."""
        with self._lock:
            self._last = status

    def add(self, **counts: Any) -> None:
        """What the server counts itself."""
        with self._lock:
            self._before = _sum(self._before, Counters(**counts))

    def lose(self, num_failed: int) -> None:
        """The engine is lost, with requests under way."""
        failed: dict[str, Any] = {"num_finished": {"failed": num_failed}} if num_failed else {}
        with self._lock:
            self._before = _sum(_sum(self._before, self._last.counters), Counters(**failed))
            slots = tuple(SlotStatus(one.slot, 0, "") for one in self._last.slots)
            self._last = CoreStatus(0, 0, slots, 0.0, 0, 0, Counters())

    def status(self, *, is_closing: bool) -> CoreStatus:
        """The latest, with the sums of all."""
        with self._lock:
            counters = _sum(self._before, self._last.counters)
            return replace(self._last, counters=counters, is_closing=is_closing)


def _sum(one: Counters, other: Counters) -> Counters:
    finished = Counter(one.num_finished)
    finished.update(other.num_finished)
    sums: dict[str, Any] = {name: getattr(one, name) + getattr(other, name) for name in _SUMS}
    return Counters(**sums, num_finished=dict(finished))
