"""Keys and values in RAM, by slot: the state that attention layers keep of their sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.models.spec import ModelSpec
from krasis.formats.process.machine_limits import available_memory_bytes
from krasis.runtime.batch import Batch, Span, StateRows, StateStore
from krasis.runtime.state.places import ALIGN_BYTES, LayerPlace, layer_places
from krasis.runtime.state.reach import are_held, first_held
from krasis.runtime.state.row_form import Floats, is_indexed

Bytes = npt.NDArray[np.uint8]
Index = slice | npt.NDArray[np.intp]


@dataclass(slots=True)
class Slot:
    """One sequence. keys, values: flat bytes. lowest: the position before which it cannot go back, but for
    its beginning, whatever the rings hold; high: one past the last position that was written since.
    """

    keys: Bytes
    values: Bytes
    length: int = 0
    is_open: bool = True
    lowest: int = 0
    high: int = 0


class KvStore:
    """See ``batch.StateStore``. Memory of a slot is taken when it is first opened and, of its pages, as
    positions are written; it is kept for the next sequence.

    places: by layer, None for layers without attention. Layers with a window have a ring of positions
    (``ring_positions``), or the whole context if that is less. keeps_windows: whether there are such layers;
    then ``export`` gives of them the positions that the next token sees, and one before.
    """

    def __init__(self, spec: ModelSpec, capacity: int, dtype: str, num_slots: int = 1) -> None:
        """Raises ResourceError if the slots together cannot fit in RAM."""
        self.capacity, self.dtype, self.num_slots = capacity, dtype, num_slots
        self.places = layer_places(spec, capacity, dtype)
        held = [place for place in self.places if place is not None]
        self._keys_bytes = max((place.keys_end_bytes for place in held), default=0)
        self._values_bytes = max((place.values_end_bytes for place in held), default=0)
        self._windows = {(place.window, place.rows) for place in held if place.window is not None}
        self._slots: list[Slot] = []
        self._check_room(num_slots)

    @property
    def keeps_index(self) -> bool:
        """Whether layers keep keys of an index over tokens as the values of latents."""
        return any(place is not None and is_indexed(place.key, place.value) for place in self.places)

    @property
    def keeps_windows(self) -> bool:
        """See the class."""
        return bool(self._windows)

    @property
    def has_rings(self) -> bool:
        """Whether some layers have room for less than the whole context."""
        return any(rows < self.capacity for _, rows in self._windows)

    @property
    def slot_bytes(self) -> int:
        """Keys and values of one slot at full length."""
        return self.keys_bytes + self.values_bytes

    @property
    def keys_bytes(self) -> int:
        """Keys of one slot at full length."""
        return self._keys_bytes

    @property
    def values_bytes(self) -> int:
        """Values of one slot at full length."""
        return self._values_bytes

    def open(self) -> int:
        """See ``StateStore``."""
        for number, slot in enumerate(self._slots):
            if not slot.is_open:
                slot.is_open, slot.length, slot.lowest, slot.high = True, 0, 0, 0
                return number
        if len(self._slots) == self.num_slots:
            raise ResourceError("every slot is taken", got=self.num_slots, hint="open with more slots")
        try:
            made = self._new_slot()
        except MemoryError as error:
            raise self._no_room(f"{self.slot_bytes} bytes") from error
        self._slots.append(made)
        return len(self._slots) - 1

    def _new_slot(self) -> Slot:
        return Slot(zeros(self.keys_bytes), zeros(self.values_bytes))

    def close(self, slot: int) -> None:
        """See ``StateStore``."""
        self._live(slot).is_open = False

    def length(self, slot: int) -> int:
        """See ``StateStore``."""
        return self._live(slot).length

    def restorable(self, slot: int, position: int) -> int:
        """See ``StateStore``: any position that the slot holds, and before which it holds the windows."""
        live = self._live(slot)
        at = min(position, live.length)
        return at if self._sees(live, at) else 0

    def _sees(self, slot: Slot, position: int) -> bool:
        """Whether what a token of that position sees is there, in all layers."""
        if not position or not self._windows:
            return True
        return are_held(self._windows, slot.high, position) and position >= slot.lowest

    def _lowest(self, slot: Slot) -> int:
        """The first position that can be gone back to, but for the beginning."""
        return max(slot.lowest, first_held(self._windows, slot.high))

    def rewind(self, slot: int, position: int) -> None:
        """See ``StateStore``. Raises NativeError for a position that ``restorable`` does not give."""
        live = self._live(slot)
        if not 0 <= position <= live.length or self.restorable(slot, position) != position:
            raise NativeError("no such position is held", where="rewind", got=position, limit=live.length)
        live.length = position
        if not position:
            live.lowest = live.high = 0

    def checkpoint(self, slot: int) -> None:
        """See ``StateStore``: nothing to do."""
        self._live(slot)

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``StateStore``; of a layer with a window its last positions before num_tokens, of one without
        attention none."""
        if self.places[layer] is None:
            nothing = np.zeros((0, num_tokens, 0), np.uint8)
            return nothing, nothing
        keys, values = self.layer(slot, layer)
        index = self._rows(layer, max(0, num_tokens - (self._window(layer) or num_tokens)), num_tokens)
        return np.ascontiguousarray(keys[:, index]), np.ascontiguousarray(values[:, index])

    def exported_bytes(self, num_tokens: int) -> int:
        """What ``export`` gives of so many positions, of all layers together."""
        return sum(
            place.kv_heads
            * min(num_tokens, place.window or num_tokens)
            * (place.key.num_bytes + place.value.num_bytes)
            for place in self.places
            if place is not None
        )

    def import_(
        self, slot: int, layer: int, keys: StateRows, values: StateRows, num_tokens: int | None = None
    ) -> None:
        """See ``StateStore``. num_tokens: the positions that they are the last of; None: they are all."""
        if self.places[layer] is None:
            return
        to_keys, to_values = self.layer(slot, layer)
        given = keys.shape[1]
        end = given if num_tokens is None else num_tokens
        window, live = self._window(layer), self._live(slot)
        if given < min(end, window or end):
            raise NativeError("too few positions of a layer are given", where="import", got=given, limit=end)
        taken = min(given, to_keys.shape[1])
        index = self._rows(layer, end - taken, end)
        to_keys[:, index] = keys[:, given - taken :]
        to_values[:, index] = values[:, given - taken :]
        live.length = live.high = end
        live.lowest = max(0, end - 1) if any(end > window for window, _ in self._windows) else 0

    # ---- for backends ------------------------------------------------------------------------------------

    def layer(self, slot: int, layer: int) -> tuple[StateRows, StateRows]:
        """Views of a layer's keys and values, each [kv_heads, rows, width of one]; position p lies at
        p % rows."""
        place, live = self._place(layer), self._live(slot)
        keys = live.keys[place.offset_bytes : place.keys_end_bytes].view(place.key.numpy)
        values = live.values[place.value_offset_bytes : place.values_end_bytes].view(place.value.numpy)
        shape = (place.kv_heads, place.rows)
        return keys.reshape(*shape, place.key.width), values.reshape(*shape, place.value.width)

    def extend(
        self, slot: int, layer: int, start: int, keys: Floats, values: Floats
    ) -> tuple[StateRows, StateRows, int]:
        """Writes the rows [kv_heads, n, channels] of positions start.. and gives keys and values of the
        positions that these see, rounded as they are kept, and the first of these positions."""
        place, end = self._place(layer), start + keys.shape[1]
        first = 0 if place.window is None else max(0, start - place.window + 1)
        before = self._rows(layer, first, start)
        taken = min(end - start, place.rows)
        seen: list[StateRows] = []
        for rows, form, floats in zip(
            self.layer(slot, layer), (place.key, place.value), (keys, values), strict=True
        ):
            new = form.kept(floats)
            # A copy: a window may be overwritten by what sees it.
            old = np.array(rows[:, before]) if place.window is not None else rows[:, :0]
            rows[:, self._rows(layer, end - taken, end)] = new[:, new.shape[1] - taken :]
            all_seen = rows[:, :end] if place.window is None else np.concatenate([old, new], axis=1)
            seen.append(form.floats(all_seen))
        return seen[0], seen[1], first

    def _rows(self, layer: int, begin: int, end: int) -> Index:
        """Where positions lie."""
        rows = self._place(layer).rows
        return slice(begin, end) if end <= rows else np.arange(begin, end) % rows

    def _window(self, layer: int) -> int | None:
        place = self.places[layer]
        return None if place is None else place.window

    def _place(self, layer: int) -> LayerPlace:
        place = self.places[layer]
        if place is None:
            raise NativeError("the layer keeps no keys and values", where="state", got=layer)
        return place

    def memory(self, slot: int) -> tuple[Bytes, Bytes]:
        """All keys and all values of a slot, bytes; a layer's begin at its place's offsets."""
        live = self._live(slot)
        return live.keys, live.values

    def begin(self, batch: Batch) -> None:
        """What lies beyond the spans' starts is no longer held, nor what they overwrite in rings. Raises
        NativeError unless every span begins where its slot has been computed, and ends in it."""
        for span in batch.spans:
            length = self._live(span.slot).length
            if span.start > length or span.end > self.capacity:
                raise NativeError(
                    "positions are not computed in order, or lie beyond the slot",
                    where="batch",
                    got=f"{span.start}..{span.end} of slot {span.slot}",
                    limit=f"{length}, {self.capacity}",
                )
        for span in batch.spans:
            live = self._live(span.slot)
            if self._windows and not self._sees(live, span.start):
                raise NativeError(
                    "this position cannot be gone back to", where="batch", got=f"{span.start} of {span.slot}"
                )
        for span in batch.spans:
            live = self._live(span.slot)
            if not span.start:
                live.lowest = live.high = 0
            live.length, live.high = span.start, max(live.high, span.end)

    def advance(self, spans: Sequence[Span]) -> None:
        """The spans were computed: their slots end where they do."""
        for span in spans:
            self._live(span.slot).length = span.end

    def _live(self, slot: int) -> Slot:
        if not 0 <= slot < len(self._slots) or not self._slots[slot].is_open:
            raise NativeError("the slot is not open", where="state", got=slot, limit=self.num_slots)
        return self._slots[slot]

    def _check_room(self, num_slots: int) -> None:
        need, available = num_slots * self.slot_bytes, available_memory_bytes()
        if available is not None and need > available:
            raise self._no_room(f"{need} bytes", f"{available} bytes")

    def _no_room(self, got: str, limit: str | None = None) -> ResourceError:
        narrower = {"f32": ", or --kv-dtype f16", "f16": ", or --kv-dtype int8"}
        hint = "use a smaller --ctx" + narrower.get(self.dtype, "")
        return ResourceError("the KV cache does not fit in memory", got=got, limit=limit, hint=hint)


@runtime_checkable
class KeepsWindows(Protocol):
    """What other stores with rings have beside ``StateStore``."""

    keeps_windows: bool

    def exported_bytes(self, num_tokens: int) -> int:
        """See ``KvStore``."""
        ...

    def import_(
        self, slot: int, layer: int, keys: StateRows, values: StateRows, num_tokens: int | None = None
    ) -> None:
        """See ``KvStore``."""
        ...


def import_layer(
    state: StateStore, slot: int, layer: int, rows: tuple[StateRows, StateRows], num_tokens: int
) -> None:
    """``StateStore.import_`` of a layer of which rows may be the end alone, after num_tokens positions."""
    if isinstance(state, KvStore | KeepsWindows):
        state.import_(slot, layer, *rows, num_tokens)
    else:
        state.import_(slot, layer, *rows)


def zeros(num_bytes: int) -> Bytes:
    """Aligned memory. Zeros, not empty: large ones come from fresh pages, which cost nothing until they are
    written.
    """
    raw = np.zeros(num_bytes + ALIGN_BYTES, np.uint8)
    skip = -int(raw.ctypes.data) % ALIGN_BYTES
    return raw[skip : skip + num_bytes]
