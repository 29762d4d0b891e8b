"""Prefixes by their ids, in order: what a prompt begins with is found without a look at each of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from krasis.runtime.serving.ids import TokenIds

_ID = ">i8"  # bytes of it are in order as the ids are, none of which is negative
_ID_BYTES = 8

Entry = tuple[bytes, int]


class SortedPrefixes:
    """Keys of prefixes. In the order of their ids, what has most in common with a prompt is next to it."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, tokens: TokenIds, key: int) -> None:
        """One more. key: not negative."""
        insort(self._entries, (_bytes(tokens), key))

    def remove(self, tokens: TokenIds, key: int) -> None:
        """One that was added."""
        entry = (_bytes(tokens), key)
        at = bisect_left(self._entries, entry)
        if self._entries[at] != entry:
            raise KeyError(key)
        del self._entries[at]

    def nearest(self, tokens: TokenIds) -> tuple[int, int]:
        """(how many ids it shares with tokens, its key) of one that shares most; (0, -1) if none does."""
        wanted = _bytes(tokens)
        at = bisect_left(self._entries, (wanted, -1))
        best = (0, -1)
        for data, key in self._entries[max(at - 1, 0) : at + 1]:
            if (length := _shared(data, wanted)) > best[0]:
                best = length, key
        return best

    def beginnings(self, tokens: TokenIds) -> Iterator[tuple[int, int]]:
        """(length, key) of those that tokens begin with, the longest first. Nothing is changed meanwhile."""
        rest, end = _bytes(tokens), len(self._entries)
        while True:
            # Behind those that are the same as rest; all that rest begins with is before.
            at = bisect_left(self._entries, (rest + b"\0", -1), 0, end) - 1
            if at < 0:
                return
            data, key = self._entries[at]
            length = _shared(data, rest)
            if length * _ID_BYTES == len(data):
                yield length, key
                end = at
            else:
                rest = rest[: length * _ID_BYTES]

    def has_beginning(self, tokens: TokenIds) -> bool:
        """Whether one begins with all of tokens."""
        wanted = _bytes(tokens)
        at = bisect_left(self._entries, (wanted, -1))
        return at < len(self._entries) and self._entries[at][0].startswith(wanted)


def _bytes(tokens: TokenIds) -> bytes:
    return tokens.astype(_ID).tobytes()


def _shared(one: bytes, other: bytes) -> int:
    """How many ids both begin with, by halving: slices are compared as fast as memory is read."""
    low, high = 0, min(len(one), len(other)) // _ID_BYTES
    if one.startswith(other) or other.startswith(one):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low * _ID_BYTES : middle * _ID_BYTES] == other[low * _ID_BYTES : middle * _ID_BYTES]:
            low = middle
        else:
            high = middle
    return low
