"""What the GPU keeps of its sequences: which slots are open and how far each has been computed."""

from __future__ import annotations

from collections.abc import Sequence

from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.models.state import SNAPSHOTS
from krasis.runtime.batch import Batch, Span, StateRows
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kv_cache import GpuKvCache


def next_copy(known: dict[int, int]) -> int:
    """The number of a further copy of a slot: a free one, or the second oldest's, which is given up. known:
    numbers by position, in the order of their making."""
    if len(known) == SNAPSHOTS:
        return known.pop(list(known)[min(1, SNAPSHOTS - 1)])
    return min(set(range(SNAPSHOTS)) - set(known.values()))


class GpuState:
    """See ``batch.StateStore``. The memory of all slots is taken when the model is opened."""

    def __init__(self, cache: GpuKvCache, stream: Stream, dtype: str) -> None:
        self._cache, self._stream = cache, stream
        self.num_slots, self.capacity, self.dtype = cache.num_slots, cache.capacity, dtype
        self._lengths: list[int | None] = [None] * cache.num_slots  # None: closed

    @property
    def keeps_index(self) -> bool:
        """Whether the keys of an index over tokens are kept, too."""
        return self._cache.keeps_index

    def open(self) -> int:
        """See ``StateStore``."""
        for slot, length in enumerate(self._lengths):
            if length is None:
                self._lengths[slot] = 0
                return slot
        raise ResourceError("every slot is taken", got=self.num_slots, hint="open with more slots")

    def close(self, slot: int) -> None:
        """See ``StateStore``."""
        self.length(slot)
        self._lengths[slot] = None

    def length(self, slot: int) -> int:
        """See ``StateStore``."""
        length = self._lengths[slot] if 0 <= slot < self.num_slots else None
        if length is None:
            raise NativeError("the slot is not open", where="state", got=slot, limit=self.num_slots)
        return length

    def restorable(self, slot: int, position: int) -> int:
        """See ``StateStore``: any position that the slot holds."""
        return min(position, self.length(slot))

    def rewind(self, slot: int, position: int) -> None:
        """See ``StateStore``."""
        if not 0 <= position <= self.length(slot):
            raise NativeError(
                "no such position is held", where="rewind", got=position, limit=self.length(slot)
            )
        self._lengths[slot] = position

    def checkpoint(self, slot: int) -> None:
        """See ``StateStore``: nothing to do."""
        self.length(slot)

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``StateStore``."""
        if not 0 <= num_tokens <= self.length(slot):
            raise NativeError(
                "no such position is held", where="export", got=num_tokens, limit=self.length(slot)
            )
        return self._cache.read(self._stream, slot, layer, num_tokens)

    def import_(self, slot: int, layer: int, keys: StateRows, values: StateRows) -> None:
        """See ``StateStore``."""
        self.length(slot)
        self._cache.write(self._stream, slot, layer, keys, values)
        self._lengths[slot] = keys.shape[1]

    # ---- for the backend -----------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """What lies beyond the spans' starts is no longer held. Raises NativeError unless every span begins
        where its slot has been computed, and ends in it."""
        for span in batch.spans:
            length = self.length(span.slot)
            if span.start > length or span.end > self.capacity:
                raise NativeError(
                    "positions are not computed in order, or lie beyond the slot",
                    where="batch",
                    got=f"{span.start}..{span.end} of slot {span.slot}",
                    limit=f"{length}, {self.capacity}",
                )
        for span in batch.spans:
            self._lengths[span.slot] = span.start

    def begin_where_restorable(self, batch: Batch) -> None:
        """``begin`` of states that cannot be cut anywhere: slots go back to where their spans begin. Raises
        NativeError where one cannot, before anything is changed."""
        for span in batch.spans:
            length = self.length(span.slot)
            if span.start <= length and self.restorable(span.slot, span.start) != span.start:
                raise NativeError(
                    "this position cannot be gone back to",
                    where="batch",
                    got=f"{span.start} of slot {span.slot}",
                    limit=self.restorable(span.slot, span.start),
                )
        lengths = [self.length(span.slot) for span in batch.spans]
        GpuState.begin(self, batch)  # raises before it changes anything
        for span, length in zip(batch.spans, lengths, strict=True):
            self._lengths[span.slot] = length
            self.rewind(span.slot, span.start)

    def require_restorable(self, batch: Batch) -> None:
        """Raises ResourceError unless all spans of a pass that broke off can begin again."""
        for span in batch.spans:
            if self.restorable(span.slot, span.start) != span.start:
                raise ResourceError(
                    "the GPU's memory ran out in a pass whose beginning cannot be gone back to",
                    where=f"slot {span.slot}",
                    got=span.start,
                    hint="the next pass takes fewer tokens at a time: ask again",
                )

    def advance(self, spans: Sequence[Span]) -> None:
        """The spans were computed: their slots end where they do."""
        for span in spans:
            self._lengths[span.slot] = span.end

    def touch(self, batch: Batch) -> None:
        """The batch is about to be computed: till ``advance`` what its sequences keep is in doubt beyond
        their spans' starts."""

    def row_after_abort(self, batch: Batch, row: int) -> int:
        """After a pass over the batch's rows from that one on broke off: where to go on. What it wrote of
        keys and values is written once more."""
        return row

    def continue_at(self, slot: int, position: int) -> None:
        """For callers that name positions and know no slots: the slot is open, and ends there."""
        self._lengths[slot] = position
