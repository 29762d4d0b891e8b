"""Token ids that grow by one a step and are compared by thousands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int64]
_GLANCE = 64  # most sequences that differ do so early


class Ids:
    """Ids of a sequence; only appended to. len() is how many."""

    __slots__ = ("_buffer", "_size")

    def __init__(self, ids: Sequence[int] | TokenIds = ()) -> None:
        self._buffer: TokenIds = np.array(ids, dtype=np.int64)
        self._size = len(self._buffer)

    def __len__(self) -> int:
        return self._size

    def append(self, token: int) -> None:
        """One more."""
        if self._size == len(self._buffer):
            grown = np.empty(max(64, 2 * self._size), dtype=np.int64)
            grown[: self._size] = self._buffer
            self._buffer = grown
        self._buffer[self._size] = token
        self._size += 1

    def first(self, count: int) -> TokenIds:
        """A view of the first count, as many as there are at most."""
        return self._buffer[: min(count, self._size)]

    def between(self, begin: int, end: int) -> TokenIds:
        """A view of ids begin..end-1."""
        return self._buffer[begin : min(end, self._size)]


def shared_length(one: TokenIds, other: TokenIds) -> int:
    """How many ids both begin with."""
    size = min(len(one), len(other))
    for count in (min(size, _GLANCE), size):
        differs = one[:count] != other[:count]
        at = int(differs.argmax()) if count else 0
        if count and differs[at]:
            return at
        if count == size:
            break
    return size
