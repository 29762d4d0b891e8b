"""What rank 0 keeps of its sequences, and how much of it the other ranks have too."""

from __future__ import annotations

from krasis.runtime.batch import Batch, StateRows
from krasis.runtime.distributed.ranked import RankedState


class FirstRanksState:
    """See ``batch.StateStore``: rank 0's own, which counts for each slot the positions that all ranks have.

    What is opened, closed or gone back in needs no other rank: a position counts from when all ranks have
    computed it until something is written before or at it by rank 0 alone.
    """

    def __init__(self, inner: RankedState) -> None:
        self._inner = inner
        self.num_slots, self.capacity, self.dtype = inner.num_slots, inner.capacity, inner.dtype
        self.copies_inside = bool(getattr(inner, "copies_inside", False))
        self.keeps_index = bool(getattr(inner, "keeps_index", False))
        self.recurrent = tuple(getattr(inner, "recurrent", ()))
        self._num_shared = [0] * inner.num_slots

    def open(self) -> int:
        """See ``StateStore``."""
        return self._inner.open()

    def close(self, slot: int) -> None:
        """See ``StateStore``."""
        self._inner.close(slot)

    def length(self, slot: int) -> int:
        """See ``StateStore``."""
        return self._inner.length(slot)

    def restorable(self, slot: int, position: int) -> int:
        """See ``StateStore``."""
        return self._inner.restorable(slot, position)

    def rewind(self, slot: int, position: int) -> None:
        """See ``StateStore``."""
        self._inner.rewind(slot, position)

    def checkpoint(self, slot: int) -> None:
        """See ``StateStore``."""
        self._inner.checkpoint(slot)

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``StateStore``."""
        return self._inner.export(slot, layer, num_tokens)

    def import_(self, slot: int, layer: int, keys: StateRows, values: StateRows) -> None:
        """See ``StateStore``."""
        self._inner.import_(slot, layer, keys, values)
        self._num_shared[slot] = 0

    # ---- for the backend -----------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> list[int]:
        """A batch is about to be computed, by whomever: how many positions before its first token of each
        sequence all ranks have."""
        for span in batch.spans:
            self._num_shared[span.slot] = min(self._num_shared[span.slot], span.start)
        return [self._num_shared[span.slot] for span in batch.spans]

    def advance(self, batch: Batch) -> None:
        """All ranks have computed it."""
        for span in batch.spans:
            self._num_shared[span.slot] = span.end
