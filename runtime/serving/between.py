"""When the answers under way get a step while a pass is being computed, between two of its layers.

A pass takes seconds to a minute; without such steps every other stream would stand still for so long.
"""

from __future__ import annotations

MOST_PAUSE_S = 0.3  # what a reader of a stream may have to wait beside the step itself
SHARE = 2.0  # a pause is so many steps long, up to that


class Between:
    """pause_s: the least time from the end of a step to the next. is_possible: whether the backend can."""

    __slots__ = ("_ended_s", "_is_possible", "_pause_s", "_spent_s", "_took_s")

    def __init__(self, pause_s: float, is_possible: bool) -> None:
        self._pause_s, self._is_possible = pause_s, is_possible
        self._ended_s = self._took_s = self._spent_s = 0.0

    def begin(self, now_s: float) -> None:
        """A pass begins."""
        self._ended_s, self._spent_s = now_s, 0.0

    def is_due(self, now_s: float) -> bool:
        """Whether a step is to be made now."""
        pause_s = max(self._pause_s, min(SHARE * self._took_s, MOST_PAUSE_S))
        return self._is_possible and now_s - self._ended_s >= pause_s

    def stepped(self, begin_s: float, end_s: float) -> None:
        """A step was made, or there was nobody to make one for."""
        self._ended_s, self._took_s = end_s, end_s - begin_s
        self._spent_s += end_s - begin_s

    def take_s(self) -> float:
        """Seconds that steps took of the pass that has ended."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s
