"""Byte-level decoding without the tokenizers library: tokens are spelled with one letter for each byte.

Almost every model of today has such a tokenizer, and its text is wanted once a token: asking a worker for
it would cost a few per cent of a small model's speed. What the library's ByteLevel decoder does is one table,
and it is checked against the library. The table comes in slices, between other requests; what is not in it
(yet), the worker decodes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise


def _letters() -> dict[str, int]:
    """letter -> byte. Printable Latin-1 stands for itself, the rest for U+0100 onwards, in order."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _letters()
SLICE_IDS = 2048  # takes a worker 2 ms to spell


class ByteLevelDecoder:
    """Decodes the ids it has learnt. num_ids: how many it is to learn, from 0; special: those that may be
    skipped.

    One thread may ``learn`` while others decode.
    """

    __slots__ = ("_begins", "_known", "_num_ids", "_special", "_spelled", "num_learnt")

    def __init__(self, num_ids: int, special: Sequence[int]) -> None:
        self._num_ids = num_ids
        self._special = frozenset(special)
        self._spelled: list[bytes] = []  # by slice
        self._begins: list[array[int]] = []
        self._known: dict[int, bytes] = {}
        self.num_learnt = 0

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to learn."""
        return self.num_learnt >= self._num_ids

    @property
    def next_slice(self) -> tuple[int, int]:
        """Ids that are to be learnt next: first, and one behind the last."""
        return self.num_learnt, min(self.num_learnt + SLICE_IDS, self._num_ids)

    def learn(self, spelled: bytes, begins: bytes) -> None:
        """The next slice. spelled: its tokens, UTF-8 end to end; begins: u32 [ids + 1]. ValueError if that is
        no such slice."""
        first, end = self.next_slice
        places = array("I", begins)
        if len(places) != end - first + 1 or places[-1] != len(spelled):
            raise ValueError("a table of tokens does not fit its text")
        if any(one > other for one, other in pairwise(places)):
            raise ValueError("a table of tokens is out of order")
        self._spelled.append(spelled)
        self._begins.append(places)
        self.num_learnt = end

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str | None:
        """The text; broken UTF-8 becomes U+FFFD. None if an id is not learnt."""
        known = self._known
        skipped = self._special if skip_special else frozenset()
        parts = []
        for one in ids:
            piece = known.get(one)
            if piece is None:
                piece = self._piece(one)
            if piece is None:
                return None
            if one not in skipped:
                parts.append(piece)
        return b"".join(parts).decode("utf-8", "replace")

    def _piece(self, number: int) -> bytes | None:
        if not 0 <= number < self.num_learnt:
            return None
        index, place = divmod(number, SLICE_IDS)
        raw = self._spelled[index][self._begins[index][place] : self._begins[index][place + 1]]
        text = raw.decode("utf-8")
        # A token with any other letter is no string of bytes: it is written as it is.
        piece = bytes(map(_BYTES.__getitem__, text)) if all(map(_BYTES.__contains__, text)) else raw
        self._known[number] = piece
        return piece
