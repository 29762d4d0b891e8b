"""How far back a sequence can go, by what its rings still hold.

Windows are pairs (positions that a token sees, places of the ring). high: one past the last position that was
written.
"""

from __future__ import annotations

from collections.abc import Iterable

Windows = Iterable[tuple[int, int]]


def are_held(windows: Windows, high: int, position: int) -> bool:
    """Whether the rings have all that a token at a position sees before it."""
    return all(max(0, position - window + 1) >= high - places for window, places in windows)


def first_held(windows: Windows, high: int) -> int:
    """The first position of which that is so, but for those whose window begins at 0."""
    needed = (high - places + window - 1 for window, places in windows if high > places)
    return max(*needed, 0, 0)
