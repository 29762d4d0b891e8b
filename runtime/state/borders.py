"""Where a prompt is cut so that a state which each token overwrites can be gone back to."""

from __future__ import annotations

from collections.abc import Iterator

from krasis.formats.models.state import TAIL_TOKENS

__all__ = ["STEP_TOKENS", "TAIL_TOKENS", "pieces"]

STEP_TOKENS = 2048
"""Tokens of a long prompt between two copies of the state."""


def borders(start: int, end: int) -> list[int]:
    """The positions between two at which ``pieces`` has the state copied, ascending."""
    before_tail = max(end - start - TAIL_TOKENS, 0)
    inner = [*range(STEP_TOKENS, before_tail, STEP_TOKENS), before_tail]
    return [start + at for at in inner if at]


def pieces(count: int, most: int, *, snapshots: bool) -> Iterator[tuple[int, int]]:
    """(begin, end) of the passes that compute count tokens, each of at most ``most``. snapshots: whether
    the state is copied after each but the last.
    """
    if not snapshots:
        yield from ((begin, min(begin + most, count)) for begin in range(0, count, most))
        return
    step, begin = min(most, STEP_TOKENS), 0
    before_tail = max(count - TAIL_TOKENS, 0)
    while begin < count:
        end = min(begin + step, before_tail if begin < before_tail else count)
        yield begin, end
        begin = end
