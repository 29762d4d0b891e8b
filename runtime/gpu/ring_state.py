"""What the GPU keeps of sequences of which some layers have rings: the last positions of a window alone.

As on the CPU (``state/hybrid_store.py``) a sequence can go back as far as the rings hold what is seen
there, to copies (``checkpoint``) and the positions right before them, and to its beginning. The device
copies at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from krasis.formats.errors import NativeError
from krasis.formats.models.state import TAIL_TOKENS
from krasis.runtime.batch import Batch, StateRows
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.kv_rings import KvRings, first_copied
from krasis.runtime.gpu.state import GpuState, next_copy
from krasis.runtime.state.reach import are_held, first_held


@dataclass(slots=True)
class _Reach:
    """Of a slot. lowest, high: as ``kv_store.Slot`` has them. numbers, lowests: of copies by position, in the
    order of their making: which one it is, and the first position that it can take the slot back to."""

    lowest: int = 0
    high: int = 0
    numbers: dict[int, int] = field(default_factory=dict)
    lowests: dict[int, int] = field(default_factory=dict)

    def covering(self, position: int) -> int | None:
        """The first copy from which a position can be had."""
        found = (at for at in self.numbers if self.lowests[at] <= position <= at)
        return next(found, None)

    def forget_beyond(self, position: int) -> None:
        """Copies of what is no longer held."""
        self.numbers = {at: number for at, number in self.numbers.items() if at <= position}


class GpuRingState(GpuState):
    """See ``batch.StateStore``. At most SNAPSHOTS copies a slot: the first and the newest ones, in memory
    that is taken when the model is opened."""

    keeps_windows = True

    def __init__(self, cache: GpuKvCache, stream: Stream, dtype: str) -> None:
        super().__init__(cache, stream, dtype)
        self._rings = KvRings(cache, stream)
        self._reach = [_Reach() for _ in range(cache.num_slots)]

    def open(self) -> int:
        """See ``StateStore``."""
        slot = super().open()
        self._reach[slot] = _Reach()
        return slot

    def restorable(self, slot: int, position: int) -> int:
        """See ``StateStore``: where the rings still have what is seen, or a copy does."""
        at, reach = min(position, self.length(slot)), self._reach[slot]
        if self._sees(slot, at):
            return at
        return max((min(end, at) for end in reach.numbers if reach.lowests[end] <= at), default=0)

    def _sees(self, slot: int, position: int) -> bool:
        """Whether the rings have what a token at a position sees."""
        reach = self._reach[slot]
        if not position:
            return True
        return position >= reach.lowest and are_held(self._rings.windows, reach.high, position)

    def rewind(self, slot: int, position: int) -> None:
        """See ``StateStore``. Raises NativeError for a position that ``restorable`` did not give."""
        reach = self._reach[slot]
        if not 0 <= position <= self.length(slot) or self.restorable(slot, position) != position:
            raise NativeError("this position cannot be gone back to", where="rewind", got=position)
        end = None if self._sees(slot, position) else reach.covering(position)
        if position == 0:
            self._reach[slot] = reach = _Reach()
        elif end is not None:
            self._rings.restore(slot, reach.numbers[end], reach.lowests[end], end)
            reach.lowest, reach.high = reach.lowests[end], end
        reach.forget_beyond(position)
        super().rewind(slot, position)

    def checkpoint(self, slot: int) -> None:
        """See ``StateStore``."""
        at, reach = self.length(slot), self._reach[slot]
        if not at or at in reach.numbers or not self._sees(slot, at):
            return
        number = next_copy(reach.numbers)
        lowest = max(at - TAIL_TOKENS, reach.lowest, first_held(self._rings.windows, reach.high))
        self._rings.save(slot, number, lowest, at)
        reach.numbers[at], reach.lowests[at] = number, lowest

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``StateStore``; of a layer with a ring the last positions of its window. Raises NativeError for
        a position whose windows are not there."""
        part = self._rings.parts.get(layer)
        if part is None:
            return super().export(slot, layer, num_tokens)
        length, reach = self.length(slot), self._reach[slot]
        begin = max(0, num_tokens - (part.window or 0))
        if num_tokens <= length and self._sees(slot, num_tokens):
            return self._cache.read_pieces(self._stream, self._rings.rows(slot, layer, begin, num_tokens))
        end = reach.covering(num_tokens) if num_tokens <= length else None
        if end is None:
            raise NativeError("the windows of this position are not kept", where="export", got=num_tokens)
        first = first_copied(part, reach.lowests[end])
        number = reach.numbers[end]
        rows = self._rings.copied(slot, number, layer, begin - first, num_tokens - first)
        return self._cache.read_pieces(self._stream, [rows])

    def exported_bytes(self, num_tokens: int) -> int:
        """What ``export`` gives of so many positions, of all layers together."""
        return sum(
            part.row_bytes * min(num_tokens, part.window if part.ring and part.window else num_tokens)
            for part in self._cache.parts
            if part is not None
        )

    def import_(
        self, slot: int, layer: int, keys: StateRows, values: StateRows, num_tokens: int | None = None
    ) -> None:
        """See ``StateStore``. num_tokens: the positions that they are the last of; None: they are all."""
        self.length(slot)
        given, part = keys.shape[1], self._rings.parts.get(layer)
        end = given if num_tokens is None else num_tokens
        if given < min(end, end if part is None else part.window or end):
            raise NativeError("too few positions of a layer are given", where="import", got=given, limit=end)
        self._cache.write(self._stream, slot, layer, keys, values, 0 if part is None else end - given)
        self._lengths[slot] = end
        cut = any(end > window for window, _ in self._rings.windows)
        self._reach[slot] = _Reach(max(0, end - 1) if cut else 0, end)

    # ---- for the backend -----------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """As ``GpuState``; a span begins where its slot ends, or where it can go back to. A copy is made of
        the windows there if the span overwrites them: a pass that breaks off begins again there."""
        self.begin_where_restorable(batch)
        for span in batch.spans:
            reach = self._reach[span.slot]
            if not are_held(self._rings.windows, max(reach.high, span.end), span.start):
                self.checkpoint(span.slot)
            reach.high = max(reach.high, span.end)

    def row_after_abort(self, batch: Batch, row: int) -> int:
        """See ``GpuState``: the first, if all sequences can go back to where it begins. Raises ResourceError
        if not."""
        self.require_restorable(batch)
        self.begin(batch)
        return 0

    def continue_at(self, slot: int, position: int) -> None:
        """See ``GpuState``: from there on, not before."""
        super().continue_at(slot, position)
        self._reach[slot] = _Reach(position, position)
