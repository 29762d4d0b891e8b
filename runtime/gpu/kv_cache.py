"""What sequences keep on the device, by slot: a sequence's memory, in which each layer with attention has its
keys and values, 16-bit, and behind them each layer of the gated delta rule its state, float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import NativeError
from krasis.formats.limits import align_up
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import SNAPSHOTS
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.kernels.dtypes import numpy_dtype
from krasis.runtime.state.hybrid_store import RecurrentPlace, recurrent_places

KvRows = npt.NDArray[Any]
ITEM_BYTES = 2
F32_BYTES = 4
_ALIGN_BYTES = 256


@dataclass(frozen=True, slots=True)
class CachePart:
    """Where a layer's keys [num_kv_heads, capacity, head_dim] and values [num_kv_heads, capacity, value_dim]
    begin in a slot, in elements. value_dim: 0 for latent attention, whose values are its keys."""

    keys: int
    values: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


class GpuKvCache:
    """memory: [num_slots, elements of a slot] of dtype, on the device, 0 at first: what decode's captured
    launches name as read is all of it. parts: of each layer, None for layers without attention. recurrent:
    where a layer's state lies among a slot's fixed_bytes, None for layers without one. copies: [num_slots,
    SNAPSHOTS, fixed_bytes], of fixed bytes at other positions. borders: positions of a slot at which the pass
    that is to come copies its state, each with the number of its copy.

    Raises OutOfDeviceMemoryError.
    """

    __slots__ = (
        "_device",
        "_fixed_begin",
        "_fixed_staging",
        "_staging",
        "_views",
        "borders",
        "capacity",
        "copies",
        "dtype",
        "fixed_bytes",
        "memory",
        "num_slots",
        "parts",
        "recurrent",
    )

    def __init__(
        self,
        device: Device,
        stream: Stream,
        spec: ModelSpec,
        capacity: int,
        dtype: torch.dtype,
        num_slots: int = 1,
    ) -> None:
        self._device = device
        self._staging: torch.Tensor | None = None
        self._fixed_staging: torch.Tensor | None = None
        self.capacity, self.dtype, self.num_slots = capacity, dtype, num_slots
        self.parts: list[CachePart | None] = []
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        end = 0
        for layer in spec.layers:
            mixer = layer.mixer
            if isinstance(mixer, LatentAttention):
                sizes = 1, mixer.kv_rank + mixer.rope_dim, 0
            elif isinstance(mixer, Attention):
                sizes = mixer.kv_heads, mixer.head_dim, mixer.head_dim
            else:
                self.parts.append(None)
                continue
            heads, head_dim, value_dim = sizes
            values = end + heads * capacity * head_dim
            self.parts.append(CachePart(end, values, *sizes))
            end = values + heads * capacity * value_dim
        self.recurrent = recurrent_places(spec)
        self.fixed_bytes = sum(place.num_bytes for place in self.recurrent if place is not None)
        self._fixed_begin = end * ITEM_BYTES
        if self.fixed_bytes:
            self._fixed_begin = align_up(self._fixed_begin, _ALIGN_BYTES)
            end = align_up(self._fixed_begin + self.fixed_bytes, _ALIGN_BYTES) // ITEM_BYTES
        self.borders: dict[int, dict[int, int]] = {}
        self.copies = device.empty((num_slots, SNAPSHOTS, self.fixed_bytes), torch.uint8)
        self.memory = device.empty((num_slots, end), dtype)
        memory = self.memory

        def clear(_: int) -> None:
            memory.zero_()

        stream.launch("clear KV cache", clear, reads=(), writes=(memory,))

    def part(self, layer: int) -> CachePart:
        """A layer's part of a slot. Raises NativeError for a layer without attention."""
        part = self.parts[layer]
        if part is None:
            raise NativeError("the layer keeps no keys and values", where="KV cache", got=layer)
        return part

    def layer(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of a layer, as its part says: views, made once."""
        found = self._views.get((slot, layer))
        if found is None:
            part = self.part(layer)
            keys, values = (
                self.memory[slot, begin : begin + part.num_kv_heads * self.capacity * dim].view(
                    part.num_kv_heads, self.capacity, dim
                )
                for begin, dim in ((part.keys, part.head_dim), (part.values, part.value_dim))
            )
            found = self._views[slot, layer] = (keys, values)
        return found

    def halves(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All that a layer keeps, as two views of one shape [heads, capacity, channels]: keys and values, or
        the halves of latents."""
        keys, values = self.layer(slot, layer)
        if values.numel():
            return keys, values
        first, second = keys.chunk(2, dim=2)
        return first, second

    def slot_address(self, slot: int) -> int:
        """Where a slot's memory begins on the device."""
        return self.memory.data_ptr() + slot * self.memory.stride(0) * ITEM_BYTES

    def place(self, layer: int) -> RecurrentPlace:
        """A layer's place among a slot's fixed bytes. Raises NativeError for a layer without a state."""
        place = self.recurrent[layer]
        if place is None:
            raise NativeError("the layer keeps no matrices", where="state", got=layer)
        return place

    def state_offsets(self, layer: int) -> tuple[int, int]:
        """Bytes from a slot's address to a layer's matrices and columns."""
        place = self.place(layer)
        begin = self._fixed_begin + place.offset_bytes
        return begin, begin + place.columns_bytes

    def states(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's matrices and columns, float32, flat: views."""
        return self._split(self.fixed(slot), self.place(layer))

    def state_halves(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's state, matrices and columns, in two halves [1, n, 1] of float32."""
        fixed, found = self.fixed(slot), []
        for place in self.recurrent:
            if place is not None:
                whole = fixed[place.offset_bytes : place.offset_bytes + place.num_bytes].view(torch.float32)
                low, high = whole.view(2, 1, -1, 1).unbind()
                found.append((low, high))
        return found

    def copy_state(self, stream: Stream, slot: int, layer: int, number: int) -> None:
        """A layer's state as it is now becomes its part of a slot's copy."""
        place = self.place(layer)
        own = slice(place.offset_bytes, place.offset_bytes + place.num_bytes)
        stream.copy(self.copies[slot, number, own], self.fixed(slot)[own])

    def fixed(self, slot: int) -> torch.Tensor:
        """A slot's fixed bytes, uint8."""
        whole = self.memory[slot].view(torch.uint8)
        return whole[self._fixed_begin : self._fixed_begin + self.fixed_bytes]

    def _split(self, fixed: torch.Tensor, place: RecurrentPlace) -> tuple[torch.Tensor, torch.Tensor]:
        begin, middle = place.offset_bytes, place.offset_bytes + place.columns_bytes
        ends = begin + F32_BYTES * math.prod(place.matrices), middle + F32_BYTES * math.prod(place.columns)
        return fixed[begin : ends[0]].view(torch.float32), fixed[middle : ends[1]].view(torch.float32)

    def layers(self, slot: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``halves`` of every layer with attention."""
        return [self.halves(slot, index) for index, part in enumerate(self.parts) if part is not None]

    def read(self, stream: Stream, slot: int, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """Keys and values of positions 0..num_tokens-1, [num_kv_heads, num_tokens, head_dim or value_dim],
        bf16 as uint16 bits.

        In a pinned buffer that the next call overwrites. stream: after whatever wrote them.
        """
        staging = self._rows(self.part(layer), num_tokens)
        self._device.host_writes(*staging)
        for rows, cache in zip(staging, self.layer(slot, layer), strict=True):
            for head in range(rows.shape[0] if rows.numel() else 0):
                stream.copy(rows[head], cache[head, :num_tokens])
        stream.synchronize()
        self._device.host_reads(*staging)
        keys, values = (self._array(rows) for rows in staging)
        return keys, values

    def write(self, stream: Stream, slot: int, layer: int, keys: KvRows, values: KvRows) -> None:
        """Writes positions from 0 on; returns when they have arrived."""
        staging = self._rows(self.part(layer), keys.shape[1])
        self._device.host_writes(*staging)
        for rows, given in zip(staging, (keys, values), strict=True):
            np.copyto(self._array(rows), given)
        for rows, cache in zip(staging, self.layer(slot, layer), strict=True):
            for head in range(rows.shape[0] if rows.numel() else 0):
                stream.copy(cache[head, : keys.shape[1]], rows[head])
        stream.synchronize()

    def read_state(self, stream: Stream, fixed: torch.Tensor, layer: int) -> tuple[KvRows, KvRows]:
        """A layer's matrices [value_heads, n, 16] and columns [1, conv_width - 1, channels] of fixed bytes, a
        slot's or a copy's, in a pinned buffer that the next call overwrites."""
        place = self.place(layer)
        staging = self._state_rows(place)
        self._device.host_writes(*staging)
        for rows, state in zip(staging, self._split(fixed, place), strict=True):
            stream.copy(rows, state)
        stream.synchronize()
        self._device.host_reads(*staging)
        matrices, columns = (one.numpy() for one in staging)
        return matrices.reshape(place.matrices[0], -1, place.matrices[-1]), columns.reshape(1, *place.columns)

    def write_state(self, stream: Stream, slot: int, layer: int, matrices: KvRows, columns: KvRows) -> None:
        """Writes what ``read_state`` gave; returns when it has arrived."""
        staging = self._state_rows(self.place(layer))
        self._device.host_writes(*staging)
        for rows, host, state in zip(staging, (matrices, columns), self.states(slot, layer), strict=True):
            np.copyto(rows.numpy(), host.reshape(-1))
            stream.copy(state, rows)
        stream.synchronize()

    def _state_rows(self, place: RecurrentPlace) -> tuple[torch.Tensor, torch.Tensor]:
        """Pinned room for one layer's state: made for the largest when first asked for."""
        if self._fixed_staging is None:
            most = max(one.num_bytes for one in self.recurrent if one is not None)
            self._fixed_staging = self._device.pinned((most,), torch.uint8)
        return self._split(self._fixed_staging, replace(place, offset_bytes=0))

    def _array(self, rows: torch.Tensor) -> KvRows:
        return rows.view(torch.int16).numpy().view(numpy_dtype(self.dtype))

    def _rows(self, part: CachePart, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pinned, of num_tokens keys and values: made for the whole capacity when first asked for."""
        heads, dims = part.num_kv_heads, (part.head_dim, part.value_dim)
        if self._staging is None:
            kept = [one for one in self.parts if one is not None]
            most = max(one.num_kv_heads * (one.head_dim + one.value_dim) for one in kept)
            self._staging = self._device.pinned((most * self.capacity,), self.dtype)
        middle, end = heads * num_tokens * dims[0], heads * num_tokens * sum(dims)
        parts = self._staging[:middle], self._staging[middle:end]
        keys, values = (rows.view(heads, num_tokens, dim) for rows, dim in zip(parts, dims, strict=True))
        return keys, values
