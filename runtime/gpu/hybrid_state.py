"""What the GPU keeps of sequences of which some layers overwrite a matrix with each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.state import SNAPSHOTS
from krasis.runtime.batch import Batch, Span, StateRows
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.ring_state import GpuRingState
from krasis.runtime.gpu.state import GpuState, next_copy
from krasis.runtime.gpu.token_history import TokenHistory
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
    where ``borders`` says: shorter passes would read all experts again. history: of models with hashed
    tables, which keep the last token ids too: on the host.
    """

    copies_inside = True

    def __init__(
        self, cache: GpuKvCache, stream: Stream, dtype: str, history: TokenHistory | None = None
    ) -> None:
        super().__init__(cache, stream, dtype)
        self._history = history
        self.recurrent = cache.recurrent
        self._copies = [_Copies() for _ in range(cache.num_slots)]

    def open(self) -> int:
        """See ``StateStore``."""
        slot = super().open()
        self._copies[slot] = _Copies()
        if self._history is not None:
            self._history.forget(slot)
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
        number = next_copy(known)
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
            return self._state(self._cache.fixed(slot), slot, layer, num_tokens)
        number = copies.by_position.get(num_tokens)
        if number is None:
            raise NativeError("the state of this position is not kept", where="export", got=num_tokens)
        return self._state(self._cache.copies[slot, number], slot, layer, num_tokens)

    def _state(
        self, fixed: torch.Tensor, slot: int, layer: int, num_tokens: int
    ) -> tuple[StateRows, StateRows]:
        """A layer's state in fixed bytes, with the ids before a position where it has a hashed table."""
        found = self._cache.read_state(self._stream, fixed, layer)
        if self._history is not None and self._cache.place(layer).num_table:
            ids = self._history.before(slot, num_tokens).astype(np.int32)
            _ids_of(found, self._history.reach)[:] = ids
        return found

    def import_(self, slot: int, layer: int, keys: StateRows, values: StateRows) -> None:
        """See ``StateStore``; layers with a matrix take what ``export`` gave."""
        self.length(slot)
        self._copies[slot] = _Copies()
        if self.recurrent[layer] is None:
            super().import_(slot, layer, keys, values)
        else:
            self._cache.write_state(self._stream, slot, layer, keys, values)
            if self._history is not None and self._cache.place(layer).num_table:
                self._history.give(slot, _ids_of((keys, values), self._history.reach).astype(np.int64))

    # ---- for the backend -----------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """As ``GpuState``; a span begins where its slot ends, or where it can go back to, and its state is
        the one there."""
        self.begin_where_restorable(batch)
        for span in batch.spans:
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
        self.require_restorable(batch)
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


def _ids_of(state: tuple[StateRows, StateRows], reach: int) -> npt.NDArray[np.int32]:
    """The last token ids, as their bits, in a state with a hashed table: a view."""
    rows = state[1] if state[1].size else state[0]
    return rows.reshape(-1)[-reach:].view(np.int32)


def gpu_state(cache: GpuKvCache, stream: Stream, dtype: str, history: TokenHistory | None = None) -> GpuState:
    """The state of a model's sequences."""
    if cache.ring_parts:
        return GpuRingState(cache, stream, dtype)
    if cache.fixed_bytes:
        return GpuHybridState(cache, stream, dtype, history)
    return GpuState(cache, stream, dtype)
