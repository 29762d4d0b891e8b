"""What the GPU keeps of sequences of which some layers overwrite a matrix with each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.models.state import SNAPSHOTS
from krasis.runtime.batch import Batch, Span, StateRows
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.state import GpuState
from krasis.runtime.state.borders import borders


@dataclass(slots=True)
class _Copies:
    """is_current: a slot's state is that of its length; else a pass broke off. by_position: the number of
    the copy, in the order of the copies' making."""

    is_current: bool = True
    by_position: dict[int, int] = field(default_factory=dict)


class GpuHybridState(GpuState):
    """See ``batch.StateStore``. At most SNAPSHOTS copies a slot: the first and the newest ones, made by the
    device in memory that is taken when the model is opened. copies_inside: also inside a pass of many tokens,
    where ``borders`` says: shorter passes would read all experts again.
    """

    copies_inside = True

    def __init__(self, cache: GpuKvCache, stream: Stream, dtype: str) -> None:
        super().__init__(cache, stream, dtype)
        self.recurrent = cache.recurrent
        self._copies = [_Copies() for _ in range(cache.num_slots)]

    def open(self) -> int:
        """See ``StateStore``."""
        slot = super().open()
        self._copies[slot] = _Copies()
        return slot

    def restorable(self, slot: int, position: int) -> int:
        """See ``StateStore``: where the slot ends, or a copy."""
        length, copies = self.length(slot), self._copies[slot]
        if position >= length and copies.is_current:
            return length
        return max((at for at in copies.by_position if at <= min(position, length)), default=0)

    def rewind(self, slot: int, position: int) -> None:
        """See ``StateStore``. Raises NativeError for a position that ``restorable`` did not give."""
        length, copies = self.length(slot), self._copies[slot]
        if not 0 <= position <= length or self.restorable(slot, position) != position:
            raise NativeError("this position cannot be gone back to", where="rewind", got=position)
        if position == 0:
            self._copies[slot] = _Copies()
        elif not (position == length and copies.is_current):
            self._stream.copy(self._cache.fixed(slot), self._cache.copies[slot, copies.by_position[position]])
            copies.is_current = True
        self._forget_beyond(slot, position)
        super().rewind(slot, position)

    def checkpoint(self, slot: int) -> None:
        """See ``StateStore``."""
        length, copies = self.length(slot), self._copies[slot]
        known = copies.by_position
        if not length or not copies.is_current or length in known:
            return
        number = len(known)
        if number == SNAPSHOTS:
            number = known.pop(list(known)[min(1, SNAPSHOTS - 1)])
        else:
            number = min(set(range(SNAPSHOTS)) - set(known.values()))
        self._stream.copy(self._cache.copies[slot, number], self._cache.fixed(slot))
        known[length] = number

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``StateStore``. Of a layer with a matrix: it, [value_heads, n, 16], and the convolution's
        columns, [1, conv_width - 1, channels]. Raises NativeError for a position whose state is not
        there."""
        if self.recurrent[layer] is None:
            return super().export(slot, layer, num_tokens)
        length, copies = self.length(slot), self._copies[slot]
        if num_tokens == length and copies.is_current:
            return self._cache.read_state(self._stream, self._cache.fixed(slot), layer)
        number = copies.by_position.get(num_tokens)
        if number is None:
            raise NativeError("the state of this position is not kept", where="export", got=num_tokens)
        return self._cache.read_state(self._stream, self._cache.copies[slot, number], layer)

    def import_(self, slot: int, layer: int, keys: StateRows, values: StateRows) -> None:
        """See ``StateStore``; layers with a matrix take what ``export`` gave."""
        self.length(slot)
        self._copies[slot] = _Copies()
        if self.recurrent[layer] is None:
            super().import_(slot, layer, keys, values)
        else:
            self._cache.write_state(self._stream, slot, layer, keys, values)

    # ---- for the backend -----------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """As ``GpuState``; a span begins where its slot ends, or where it can go back to, and its state is
        the one there."""
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
        super().begin(batch)  # raises before it changes anything
        for span, length in zip(batch.spans, lengths, strict=True):
            self._lengths[span.slot] = length
            self.rewind(span.slot, span.start)
            if span.rows > 1:  # a pass that breaks off begins again here
                self.checkpoint(span.slot)
            self._cache.borders[span.slot] = self._numbered(span)

    def touch(self, batch: Batch) -> None:
        """See ``GpuState``: the states are those of no position."""
        for span in batch.spans:
            self._copies[span.slot].is_current = False

    def advance(self, spans: Sequence[Span]) -> None:
        """See ``GpuState``."""
        super().advance(spans)
        for span in spans:
            copies = self._copies[span.slot]
            found = copies.by_position | self._cache.borders.pop(span.slot, {})
            copies.by_position = dict(sorted(found.items()))
            copies.is_current = True

    def row_after_abort(self, batch: Batch, row: int) -> int:
        """See ``GpuState``: the first, if all states can be gone back to. Raises ResourceError if not."""
        for span in batch.spans:
            if self.restorable(span.slot, span.start) != span.start:
                raise ResourceError(
                    "the GPU's memory ran out in a pass whose beginning cannot be gone back to",
                    where=f"slot {span.slot}",
                    got=span.start,
                    hint="the next pass takes fewer tokens at a time: ask again",
                )
        self.begin(batch)
        self.touch(batch)
        return 0

    def continue_at(self, slot: int, position: int) -> None:
        """See ``GpuState``: rank 0 sends the state."""
        super().continue_at(slot, position)
        self._copies[slot] = _Copies()

    def _numbered(self, span: Span) -> dict[int, int]:
        """Where a pass copies the span's state, and into which copies: of those that are there, the first and
        that of its beginning stay, which it may have to go back to."""
        known, wanted = self._copies[span.slot].by_position, borders(span.start, span.end)
        room = SNAPSHOTS - min(2, len(known))
        wanted = wanted[-room:] if known else [*wanted[:1], *wanted[1:][1 - room :]]
        others = [at for at in list(known)[1:] if at != span.start]
        for at in others[: max(0, len(known) + len(wanted) - SNAPSHOTS)]:
            del known[at]
        free = sorted(set(range(SNAPSHOTS)) - set(known.values()))
        return dict(zip(wanted, free, strict=False))

    def _forget_beyond(self, slot: int, position: int) -> None:
        copies = self._copies[slot]
        copies.by_position = {at: number for at, number in copies.by_position.items() if at <= position}


def gpu_state(cache: GpuKvCache, stream: Stream, dtype: str) -> GpuState:
    """The state of a model's sequences."""
    return (GpuHybridState if cache.fixed_bytes else GpuState)(cache, stream, dtype)
