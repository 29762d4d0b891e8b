"""Keys and values in RAM, by slot: the state that attention layers keep of their sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.limits import align_up
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.spec import Mixer, ModelSpec
from krasis.formats.process.machine_limits import available_memory_bytes
from krasis.runtime.batch import Batch, Span, StateRows

KV_NUMPY: dict[str, type[np.generic]] = {"f16": np.float16, "f32": np.float32}
_ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where a layer's keys and values lie in the arrays of a slot: [kv_heads, capacity, head_dim] elements
    from element ``offset`` on, [kv_heads, capacity, value_dim] from ``value_offset`` on. value_dim: 0 where
    keys hold the values."""

    offset: int
    kv_heads: int
    head_dim: int
    value_offset: int
    value_dim: int

    def elements(self, capacity: int) -> int:
        """Of keys."""
        return self.kv_heads * capacity * self.head_dim

    def value_elements(self, capacity: int) -> int:
        """Of values."""
        return self.kv_heads * capacity * self.value_dim


@dataclass(slots=True)
class Slot:
    """One sequence. keys, values: flat."""

    keys: StateRows
    values: StateRows
    length: int = 0
    is_open: bool = True


class KvStore:
    """See ``batch.StateStore``. Memory of a slot is taken when it is first opened and, of its pages, as
    positions are written; it is kept for the next sequence.

    places: by layer, None for layers without attention.
    """

    def __init__(self, spec: ModelSpec, capacity: int, dtype: str, num_slots: int = 1) -> None:
        """Raises ResourceError if the slots together cannot fit in RAM."""
        self.capacity, self.dtype, self.num_slots = capacity, dtype, num_slots
        self.places = layer_places(spec, capacity, KV_NUMPY[dtype])
        self._numpy = np.dtype(KV_NUMPY[dtype])
        held = [place for place in self.places if place is not None]
        self._elements = max((p.offset + p.elements(capacity) for p in held), default=0)
        self._value_elements = max((p.value_offset + p.value_elements(capacity) for p in held), default=0)
        self._slots: list[Slot] = []
        self._check_room(num_slots)

    @property
    def slot_bytes(self) -> int:
        """Keys and values of one slot at full length."""
        return self.keys_bytes + self.values_bytes

    @property
    def keys_bytes(self) -> int:
        """Keys of one slot at full length."""
        return self._elements * self._numpy.itemsize

    @property
    def values_bytes(self) -> int:
        """Values of one slot at full length."""
        return self._value_elements * self._numpy.itemsize

    def open(self) -> int:
        """See ``StateStore``."""
        for number, slot in enumerate(self._slots):
            if not slot.is_open:
                slot.is_open, slot.length = True, 0
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
        # zeros, not empty: large ones come from fresh pages, which cost nothing until they are written.
        return Slot(np.zeros(self._elements, self._numpy), np.zeros(self._value_elements, self._numpy))

    def close(self, slot: int) -> None:
        """See ``StateStore``."""
        self._live(slot).is_open = False

    def length(self, slot: int) -> int:
        """See ``StateStore``."""
        return self._live(slot).length

    def restorable(self, slot: int, position: int) -> int:
        """See ``StateStore``: any position that the slot holds."""
        return min(position, self._live(slot).length)

    def rewind(self, slot: int, position: int) -> None:
        """See ``StateStore``."""
        live = self._live(slot)
        if not 0 <= position <= live.length:
            raise NativeError("no such position is held", where="rewind", got=position, limit=live.length)
        live.length = position

    def checkpoint(self, slot: int) -> None:
        """See ``StateStore``: nothing to do."""
        self._live(slot)

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``StateStore``."""
        keys, values = self.layer(slot, layer)
        return np.ascontiguousarray(keys[:, :num_tokens]), np.ascontiguousarray(values[:, :num_tokens])

    def import_(self, slot: int, layer: int, keys: StateRows, values: StateRows) -> None:
        """See ``StateStore``."""
        to_keys, to_values = self.layer(slot, layer)
        num_tokens = keys.shape[1]
        to_keys[:, :num_tokens] = keys
        to_values[:, :num_tokens] = values
        self._live(slot).length = num_tokens

    # ---- for backends ------------------------------------------------------------------------------------

    def layer(self, slot: int, layer: int) -> tuple[StateRows, StateRows]:
        """Views of a layer's keys and values, each [kv_heads, capacity, channels of one]."""
        place, live = self.places[layer], self._live(slot)
        if place is None:
            raise NativeError("the layer keeps no keys and values", where="state", got=layer)
        end = place.offset + place.elements(self.capacity)
        keys = live.keys[place.offset : end].reshape(place.kv_heads, self.capacity, place.head_dim)
        end = place.value_offset + place.value_elements(self.capacity)
        values = live.values[place.value_offset : end]
        return keys, values.reshape(place.kv_heads, self.capacity, place.value_dim)

    def memory(self, slot: int) -> tuple[StateRows, StateRows]:
        """All keys and all values of a slot, flat; a layer's begin at its place's offsets."""
        live = self._live(slot)
        return live.keys, live.values

    def begin(self, batch: Batch) -> None:
        """What lies beyond the spans' starts is no longer held. Raises NativeError unless every span begins
        where its slot has been computed, and ends in it."""
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
            self._live(span.slot).length = span.start

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
        hint = "use a smaller --ctx" + (", or --kv-dtype f16" if self.dtype == "f32" else "")
        return ResourceError("the KV cache does not fit in memory", got=got, limit=limit, hint=hint)


def layer_places(spec: ModelSpec, capacity: int, kind: type[np.generic]) -> tuple[LayerPlace | None, ...]:
    """Where each layer's keys and values lie in a slot, one after the other, aligned for the kernels."""
    step = _ALIGN_BYTES // np.dtype(kind).itemsize
    places: list[LayerPlace | None] = []
    offset = value_offset = 0
    for layer in spec.layers:
        sizes = _sizes(layer.mixer)
        if sizes is None:
            places.append(None)
            continue
        kv_heads, head_dim, value_dim = sizes
        place = LayerPlace(offset, kv_heads, head_dim, value_offset, value_dim)
        places.append(place)
        offset = align_up(offset + place.elements(capacity), step)
        value_offset = align_up(value_offset + place.value_elements(capacity), step)
    return tuple(places)


def _sizes(mixer: Mixer | None) -> tuple[int, int, int] | None:
    """(heads, channels of a key, channels of a value) that a mixer keeps of a token."""
    if isinstance(mixer, Attention):
        return mixer.kv_heads, mixer.head_dim, mixer.head_dim
    if isinstance(mixer, LatentAttention):
        return 1, mixer.kv_rank + mixer.rope_dim, 0
    return None


def kv_bytes_per_token(spec: ModelSpec, dtype: str) -> int:
    """Bytes of keys and values of one position in all layers."""
    places = layer_places(spec, 1, np.uint8)
    elements = sum(p.kv_heads * (p.head_dim + p.value_dim) for p in places if p)
    return elements * np.dtype(KV_NUMPY[dtype]).itemsize
