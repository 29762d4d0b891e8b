"""The token ids of the sequences that a GPU keeps, for models whose tables are looked up by the last ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class TokenHistory:
    """By position, so that going back needs nothing. reach: how many ids before a token are asked for;
    boundary: what stands before a sequence."""

    def __init__(self, num_slots: int, capacity: int, reach: int, boundary: int) -> None:
        self.reach = reach
        # That of a position lies reach further.
        self._ids = np.full((num_slots, reach + capacity), boundary, np.int64)
        self._given: dict[int, Ids] = {}

    def before(self, slot: int, position: int) -> Ids:
        """[reach] ids before a position that the slot has come to."""
        if position and (given := self._given.get(slot)) is not None:
            return given
        return self._ids[slot, position : position + self.reach]

    def put(self, slot: int, position: int, ids: Ids) -> None:
        """Those from a position on."""
        given = self._given.pop(slot, None)
        if given is not None and position:
            self._ids[slot, position : position + self.reach] = given
        begin = self.reach + position
        self._ids[slot, begin : begin + len(ids)] = ids

    def give(self, slot: int, ids: Ids) -> None:
        """[reach] ids before where the slot ends now, whose own are not known."""
        self._given[slot] = ids

    def forget(self, slot: int) -> None:
        """The slot begins anew."""
        self._given.pop(slot, None)
