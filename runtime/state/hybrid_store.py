"""The state of models of which some layers keep a matrix that each token overwrites, beside others that
keep keys and values.

What was overwritten does not come back: a sequence can go back to where it was copied alone
(``checkpoint``), and to its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.limits import align_up
from krasis.formats.models.recurrent import GatedDelta
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import SNAPSHOTS
from krasis.runtime.batch import Batch, Span, StateRows
from krasis.runtime.state.kv_store import KvStore, Slot

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
TILE_COLUMNS = 16  # of a matrix that lie together: the kernels read it in tiles of so many channels of v
_ALIGN_BYTES = 64
_F32_BYTES = 4


@dataclass(frozen=True, slots=True)
class RecurrentPlace:
    """Where a layer's state lies among a slot's fixed bytes, float32: first the matrices [value_heads,
    value_dim/16, key_dim, 16], then the columns of the convolution [conv_width - 1, channels], the oldest
    first.
    """

    offset_bytes: int
    matrices: tuple[int, int, int, int]
    columns: tuple[int, int]

    @property
    def columns_bytes(self) -> int:
        """Where the columns begin, from the layer's offset on."""
        return align_up(int(np.prod(self.matrices)) * _F32_BYTES, _ALIGN_BYTES)

    @property
    def num_bytes(self) -> int:
        """Of both, aligned."""
        return align_up(self.columns_bytes + int(np.prod(self.columns)) * _F32_BYTES, _ALIGN_BYTES)

    def views(self, fixed: Bytes) -> tuple[Floats, Floats]:
        """Matrices and columns in a slot's fixed bytes, or in a copy of them."""
        begin, middle = self.offset_bytes, self.offset_bytes + self.columns_bytes
        matrices = fixed[begin : begin + int(np.prod(self.matrices)) * _F32_BYTES]
        columns = fixed[middle : middle + int(np.prod(self.columns)) * _F32_BYTES]
        return matrices.view(np.float32).reshape(self.matrices), columns.view(np.float32).reshape(
            self.columns
        )


@dataclass(slots=True)
class _Fixed:
    """bytes: the state now. is_current: it is that of the slot's length; else a pass broke off."""

    bytes: Bytes
    is_current: bool = True
    copies: dict[int, Bytes] = field(default_factory=dict)  # by position, ascending

    def at(self, position: int, length: int) -> Bytes | None:
        """The state of a position, if it is there."""
        if position == length and self.is_current:
            return self.bytes
        return self.copies.get(position)


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
        super().__init__(spec, capacity, dtype, num_slots)

    @property
    def slot_bytes(self) -> int:
        """Keys, values and fixed bytes of one slot at full length, with all its snapshots."""
        return super().keys_bytes + self.values_bytes + (1 + SNAPSHOTS) * self.fixed_bytes

    @property
    def fixed_offset_bytes(self) -> int:
        """See the class."""
        return align_up(super().keys_bytes, _ALIGN_BYTES)

    @property
    def keys_bytes(self) -> int:
        """See ``KvStore``: with the fixed bytes."""
        return self.fixed_offset_bytes + self.fixed_bytes

    def _new_slot(self) -> Slot:
        need = self.keys_bytes
        raw = np.zeros(need + _ALIGN_BYTES, np.uint8)
        skip = -int(raw.ctypes.data) % _ALIGN_BYTES
        keys = raw[skip : skip + need].view(self._numpy)
        self._fixed[len(self._slots)] = _Fixed(raw[skip + self.fixed_offset_bytes : skip + need])
        return Slot(keys, np.zeros(self._value_elements, self._numpy))

    def open(self) -> int:
        """See ``StateStore``."""
        slot = super().open()
        self._forget(self._fixed[slot])
        return slot

    def restorable(self, slot: int, position: int) -> int:
        """See ``StateStore``: where the slot ends, or a copy."""
        length, fixed = self._live(slot).length, self._fixed[slot]
        if position >= length and fixed.is_current:
            return length
        return max((one for one in fixed.copies if one <= min(position, length)), default=0)

    def rewind(self, slot: int, position: int) -> None:
        """See ``StateStore``. Raises NativeError for a position that ``restorable`` did not give."""
        live, fixed = self._live(slot), self._fixed[slot]
        if not 0 <= position <= live.length or self.restorable(slot, position) != position:
            raise NativeError("this position cannot be gone back to", where="rewind", got=position)
        if position == 0:
            self._forget(fixed)
        elif not (position == live.length and fixed.is_current):
            fixed.bytes[...] = fixed.copies[position]
            fixed.is_current = True
        fixed.copies = {at: copy for at, copy in fixed.copies.items() if at <= position}
        live.length = position

    def checkpoint(self, slot: int) -> None:
        """See ``StateStore``."""
        length, fixed = self._live(slot).length, self._fixed[slot]
        if not length or not fixed.is_current or length in fixed.copies:
            return
        if len(fixed.copies) < SNAPSHOTS:
            fixed.copies[length] = fixed.bytes.copy()
            return
        oldest = list(fixed.copies)[min(1, len(fixed.copies) - 1)]
        buffer = fixed.copies.pop(oldest)
        buffer[...] = fixed.bytes
        fixed.copies[length] = buffer

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """See ``StateStore``. Of a layer with a matrix: it, [value_heads, n, 16], and the convolution's
        columns, [1, conv_width - 1, channels]. Raises NativeError for a position whose state is not
        there."""
        place = self.recurrent[layer]
        if place is None:
            return super().export(slot, layer, num_tokens)
        fixed = self._fixed[slot].at(num_tokens, self._live(slot).length)
        if fixed is None:
            raise NativeError("the state of this position is not kept", where="export", got=num_tokens)
        matrices, columns = place.views(fixed)
        return matrices.reshape(len(matrices), -1, TILE_COLUMNS), columns[None]

    def import_(self, slot: int, layer: int, keys: StateRows, values: StateRows) -> None:
        """See ``StateStore``; layers with a matrix take what ``export`` gave."""
        place, fixed = self.recurrent[layer], self._fixed[slot]
        fixed.copies, fixed.is_current = {}, True
        if place is None:
            super().import_(slot, layer, keys, values)
            return
        self._live(slot)
        matrices, columns = place.views(fixed.bytes)
        matrices[...] = keys.reshape(matrices.shape)
        columns[...] = values.reshape(columns.shape)

    # ---- for backends ------------------------------------------------------------------------------------

    def fixed(self, slot: int, layer: int) -> tuple[Floats, Floats]:
        """Views of a layer's matrices and columns."""
        place = self.recurrent[layer]
        if place is None:
            raise NativeError("the layer keeps no matrices", where="state", got=layer)
        self._live(slot)
        return place.views(self._fixed[slot].bytes)

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
        super().begin(batch)
        for span in batch.spans:
            self._fixed[span.slot].is_current = False

    def advance(self, spans: Sequence[Span]) -> None:
        """See ``KvStore``."""
        super().advance(spans)
        for span in spans:
            self._fixed[span.slot].is_current = True

    def _forget(self, fixed: _Fixed) -> None:
        """Before the first token the state is zero, whatever the bytes are: what computes reads none of
        them."""
        fixed.is_current, fixed.copies = True, {}


def recurrent_places(spec: ModelSpec) -> tuple[RecurrentPlace | None, ...]:
    """Where each layer's state lies among a slot's fixed bytes."""
    places: list[RecurrentPlace | None] = []
    offset = 0
    for layer in spec.layers:
        mixer = layer.mixer
        if not isinstance(mixer, GatedDelta):
            places.append(None)
            continue
        tiles = -(-mixer.value_dim // TILE_COLUMNS)
        matrices = (mixer.value_heads, tiles, mixer.key_dim, TILE_COLUMNS)
        place = RecurrentPlace(offset, matrices, (mixer.conv_width - 1, mixer.conv_channels))
        places.append(place)
        offset += place.num_bytes
    return tuple(places)


def state_store(spec: ModelSpec, capacity: int, dtype: str, num_slots: int = 1) -> KvStore:
    """The store for a model. Raises ResourceError if the slots together cannot fit in RAM."""
    has_fixed = any(isinstance(layer.mixer, GatedDelta) for layer in spec.layers)
    return (HybridStore if has_fixed else KvStore)(spec, capacity, dtype, num_slots)
