"""How often, and when, an engine that was lost is started again. Pure."""

from __future__ import annotations

from collections.abc import Sequence

PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0)


class Restarts:
    """Counts attempts. An engine that has answered something begins the count anew: one that every request
    kills, or that cannot be opened any more, is not started for ever."""

    def __init__(self, pauses_s: Sequence[float] = PAUSES_S) -> None:
        self._pauses_s = tuple(pauses_s)
        self._num_tried = 0

    def next_pause_s(self, *, has_answered: bool) -> float | None:
        """Seconds until the next attempt; None: there is none. has_answered: the one that was lost."""
        if has_answered:
            self._num_tried = 0
        if self._num_tried == len(self._pauses_s):
            return None
        self._num_tried += 1
        return self._pauses_s[self._num_tried - 1]

    @property
    def shown(self) -> str:
        """Which attempt this is."""
        return f"attempt {self._num_tried} of {len(self._pauses_s)}"
