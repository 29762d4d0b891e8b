"""The state of models of which some layers keep what later tokens overwrite: a matrix, or the last positions
of a window, beside others that keep keys and values of all.

What was overwritten does not come back: a sequence can go back to where it was copied alone
(``checkpoint``; of windows also to some positions before, and to those whose windows are still there), and to
its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from krasis.formats.errors import NativeError
from krasis.formats.limits import align_up
from krasis.formats.models.mixers import Attention
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import SNAPSHOTS, TAIL_TOKENS, copy_bytes
from krasis.runtime.batch import Batch, Span, StateRows
from krasis.runtime.state.copies import Copy, Window
from krasis.runtime.state.kv_store import Bytes, KvStore, Slot
from krasis.runtime.state.recurrent_places import recurrent_places, state_shapes
from krasis.runtime.state.row_form import KV_NUMPY, Floats
from krasis.runtime.state.trail import Trail

_ALIGN_BYTES = 64
_SAVED_AHEAD = 31  # positions
_NEVER = 1 << 62


@dataclass(slots=True)
class _Fixed:
    """bytes: the state now. is_current: it is that of the slot's length; else a pass broke off."""

    bytes: Bytes
    is_current: bool = True
    copies: dict[int, Copy] = field(default_factory=dict)  # by position, ascending
    trail: Trail = field(default_factory=Trail)  # of the last pass, if that was one to go back into

    def covering(self, position: int) -> tuple[int, Copy] | None:
        """The first copy from which a position can be had, and its own position."""
        found = ((at, one) for at, one in self.copies.items() if one.lowest <= position <= at)
        return next(found, None)


class HybridStore(KvStore):
    """See ``batch.StateStore``. At most SNAPSHOTS copies a slot: the first and the newest ones.

    recurrent: places by layer, None for layers without such a state. fixed_offset_bytes: where a slot's
    fixed bytes begin in the memory of its keys.
    """

    def __init__(self, spec: ModelSpec, capacity: int, dtype: str, num_slots: int = 1) -> None:
        """Raises ResourceError if the slots together cannot fit in RAM."""
        self.recurrent = recurrent_places(spec)
        self.fixed_bytes = sum(place.num_bytes for place in self.recurrent if place is not None)
        self._fixed: dict[int, _Fixed] = {}
        self._copy_bytes = copy_bytes(spec, capacity, np.dtype(KV_NUMPY[dtype]).itemsize)
        super().__init__(spec, capacity, dtype, num_slots)

    @property
    def slot_bytes(self) -> int:
        """Keys, values and fixed bytes of one slot at full length, with all its snapshots."""
        return self.keys_bytes + self.values_bytes + SNAPSHOTS * self._copy_bytes

    @property
    def fixed_offset_bytes(self) -> int:
        """See the class."""
        return align_up(super().keys_bytes, _ALIGN_BYTES)

    @property
    def keys_bytes(self) -> int:
        """See ``KvStore``: with the fixed bytes."""
        return self.fixed_offset_bytes + self.fixed_bytes

    def _new_slot(self) -> Slot:
        made = super()._new_slot()
        self._fixed[len(self._slots)] = _Fixed(made.keys[self.fixed_offset_bytes :])
        return made

    def open(self) -> int:
        """See ``StateStore``."""
        slot = super().open()
        self._forget(self._fixed[slot])
        return slot

    def restorable(self, slot: int, position: int) -> int:
        """See ``StateStore``: where what tokens overwrite is still there, or a copy of it."""
        live, fixed = self._live(slot), self._fixed[slot]
        at = min(position, live.length)
        if self._is_there(slot, at) or self._is_on_trail(slot, at):
            return at
        found = (min(end, at) for end, one in fixed.copies.items() if one.lowest <= at)
        return max(found, default=0)

    def _is_there(self, slot: int, position: int) -> bool:
        """Whether a position can be gone back to without a copy."""
        live, fixed = self._live(slot), self._fixed[slot]
        if self.fixed_bytes and not (position == live.length and fixed.is_current):
            return False
        return self._sees(live, position)

    def _is_on_trail(self, slot: int, position: int) -> bool:
        live, fixed = self._live(slot), self._fixed[slot]
        return fixed.trail.at(position) is not None and self._sees(live, position)

    def rewind(self, slot: int, position: int) -> None:
        """See ``StateStore``. Raises NativeError for a position that ``restorable`` did not give."""
        live, fixed = self._live(slot), self._fixed[slot]
        if not 0 <= position <= live.length or self.restorable(slot, position) != position:
            raise NativeError("this position cannot be gone back to", where="rewind", got=position)
        if position == 0:
            self._forget(fixed)
            live.lowest = live.high = 0
        elif self._is_there(slot, position):
            pass
        elif (left := fixed.trail.at(position)) is not None and self._is_on_trail(slot, position):
            fixed.bytes[...] = left
            fixed.is_current = True
        elif (found := fixed.covering(position)) is not None:
            end, copy = found
            fixed.bytes[...] = copy.fixed
            fixed.is_current = True
            for layer, window in copy.windows.items():
                index = self._rows(layer, window.first, window.first + window.num_saved)
                for rows, own in zip(self.layer(slot, layer), (window.keys, window.values), strict=True):
                    rows[:, index] = own[:, : window.num_saved]
            live.lowest, live.high = copy.lowest, end
        fixed.copies = {at: one for at, one in fixed.copies.items() if at <= position}
        fixed.trail.num = 0
        live.length = position

    def checkpoint(self, slot: int) -> None:
        """See ``StateStore``."""
        live, fixed = self._live(slot), self._fixed[slot]
        at = live.length
        if not at or at in fixed.copies or not self._is_there(slot, at):
            return
        if not self.fixed_bytes and not self.has_rings:
            return
        oldest = list(fixed.copies)[min(1, SNAPSHOTS - 1)] if len(fixed.copies) == SNAPSHOTS else None
        given_up = None if oldest is None else fixed.copies.pop(oldest)
        kept = fixed.bytes.copy() if given_up is None else given_up.fixed
        kept[...] = fixed.bytes
        lowest = at if self.fixed_bytes else max(at - TAIL_TOKENS, self._lowest(live))
        windows = {
            layer: self._window_copy(slot, layer, max(0, lowest - place.window), at, given_up)
            for layer, place in enumerate(self.places)
            if place is not None and place.window is not None and place.rows < self.capacity
        }
        fixed.copies[at] = Copy(kept, windows, lowest)

    def _window_copy(self, slot: int, layer: int, first: int, end: int, given_up: Copy | None) -> Window:
        """Nothing yet of a layer's positions, in the memory of a copy that is given up where that is as
        large: fresh pages cost more than what is copied."""
        old = None if given_up is None else given_up.windows[layer]
        if old is not None and old.keys.shape[1] == end - first:
            return Window(first, old.keys, old.values)
        made = [
            np.empty((len(rows), end - first, rows.shape[2]), rows.dtype) for rows in self.layer(slot, layer)
        ]
        return Window(first, made[0], made[1])

    def _save_windows(self, slot: int, end: int) -> None:
        """Before positions up to end are written: copies take what these overwrite of theirs, and a few more,
        so that most tokens have nothing to do here."""
        high = max(self._live(slot).high, end)
        for copy in self._fixed[slot].copies.values():
            if high < copy.due:
                continue
            copy.due = _NEVER
            for layer, window in copy.windows.items():
                overwritten = high - self._place(layer).rows
                if window.first + window.num_saved < overwritten:
                    self._save_window(slot, layer, window, min(overwritten + _SAVED_AHEAD, window.end))
                if window.first + window.num_saved < window.end:
                    due = window.first + window.num_saved + self._place(layer).rows + 1
                    copy.due = min(copy.due, due)

    def _save_window(self, slot: int, layer: int, window: Window, stop: int) -> None:
        index = self._rows(layer, window.first + window.num_saved, stop)
        saved = slice(window.num_saved, stop - window.first)
        for rows, own in zip(self.layer(slot, layer), (window.keys, window.values), strict=True):
            own[:, saved] = rows[:, index]
        window.num_saved = stop - window.first

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``StateStore``. Of a layer with a state what ``RecurrentPlace.exported`` says; of one with a
        window its last positions. Raises NativeError for a position whose state is not there."""
        place = self.recurrent[layer]
        if place is None and self._window(layer) is None:
            return super().export(slot, layer, num_tokens)
        fixed, is_there = self._fixed[slot], self._is_there(slot, num_tokens)
        found = None if is_there else fixed.covering(num_tokens)
        if not is_there and found is None:
            raise NativeError("the state of this position is not kept", where="export", got=num_tokens)
        if place is not None:
            return place.exported(fixed.bytes if found is None else found[1].fixed)
        if found is None or layer not in found[1].windows:
            return super().export(slot, layer, num_tokens)
        window = found[1].windows[layer]
        begin, middle = max(window.first, num_tokens - self._seen(layer)), window.first + window.num_saved
        saved = slice(begin - window.first, min(num_tokens, middle) - window.first)
        rest = self._rows(layer, max(begin, middle), max(num_tokens, middle))
        keys, values = (
            np.concatenate([own[:, saved] if begin < middle else own[:, :0], rows[:, rest]], axis=1)
            for rows, own in zip(self.layer(slot, layer), (window.keys, window.values), strict=True)
        )
        return keys, values

    def _seen(self, layer: int) -> int:
        return self._window(layer) or self.capacity

    def exported_bytes(self, num_tokens: int) -> int:
        """See ``KvStore``; with the matrices and columns."""
        states = (place.exported_bytes for place in self.recurrent if place is not None)
        return super().exported_bytes(num_tokens) + sum(states)

    def import_(
        self, slot: int, layer: int, keys: StateRows, values: StateRows, num_tokens: int | None = None
    ) -> None:
        """See ``KvStore``; layers with a matrix take what ``export`` gave."""
        place, fixed = self.recurrent[layer], self._fixed[slot]
        fixed.copies, fixed.is_current, fixed.trail.num = {}, True, 0
        if place is None:
            super().import_(slot, layer, keys, values, num_tokens)
            return
        self._live(slot)
        place.take(fixed.bytes, keys, values)

    # ---- for backends ------------------------------------------------------------------------------------

    def fixed(self, slot: int, layer: int) -> tuple[Floats, Floats]:
        """Views of a layer's matrices and columns."""
        place = self.recurrent[layer]
        if place is None:
            raise NativeError("the layer keeps no matrices", where="state", got=layer)
        self._live(slot)
        return place.views(self._fixed[slot].bytes)

    def table(self, slot: int, layer: int) -> Floats:
        """A view of what a layer's hashed table keeps: token ids as their bits."""
        place = self.recurrent[layer]
        if place is None or not place.num_table:
            raise NativeError("the layer has no hashed table", where="state", got=layer)
        self._live(slot)
        return place.table(self._fixed[slot].bytes)

    def trail(self, span: Span) -> tuple[Bytes, list[Bytes]]:
        """The slot's fixed bytes, and room for copies of them behind each row of the span but the last, which
        the pass must fill."""
        fixed = self._fixed[span.slot]
        return fixed.bytes, fixed.trail.make(span.rows - 1, self.fixed_bytes)

    def begin(self, batch: Batch) -> None:
        """As ``KvStore``; a span begins where its slot ends, or where it can go back to. Till ``advance`` the
        states are those of no position."""
        for span in batch.spans:
            length = self._live(span.slot).length
            if span.start <= length and self.restorable(span.slot, span.start) != span.start:
                raise NativeError(
                    "this position cannot be gone back to",
                    where="batch",
                    got=f"{span.start} of slot {span.slot}",
                    limit=self.restorable(span.slot, span.start),
                )
        for span in batch.spans:
            if span.start <= self._live(span.slot).length and span.end <= self.capacity:
                self.rewind(span.slot, span.start)
                self._save_windows(span.slot, span.end)
        super().begin(batch)
        for span in batch.spans:
            self._fixed[span.slot].is_current, self._fixed[span.slot].trail.num = False, 0

    def advance(self, spans: Sequence[Span]) -> None:
        """See ``KvStore``."""
        super().advance(spans)
        for span in spans:
            fixed = self._fixed[span.slot]
            fixed.is_current = True
            if span.cuts and self.fixed_bytes:
                fixed.trail.first, fixed.trail.num = span.start + 1, span.rows - 1

    def _forget(self, fixed: _Fixed) -> None:
        """Before the first token the state is zero, whatever the bytes are: what computes reads none of
        them."""
        fixed.is_current, fixed.copies, fixed.trail.num = True, {}, 0


def state_store(spec: ModelSpec, capacity: int, dtype: str, num_slots: int = 1) -> KvStore:
    """The store for a model. Raises ResourceError if the slots together cannot fit in RAM."""
    overwrites = any(
        state_shapes(layer.mixer) is not None
        or (isinstance(layer.mixer, Attention) and layer.mixer.window is not None)
        for layer in spec.layers
    )
    return (HybridStore if overwrites else KvStore)(spec, capacity, dtype, num_slots)
