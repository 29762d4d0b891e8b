"""Keys and values on the device, 16-bit, by slot: a sequence's memory, in which each layer with attention has
its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.mixers import Attention
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.kernels.dtypes import numpy_dtype

KvRows = npt.NDArray[Any]
ITEM_BYTES = 2


@dataclass(frozen=True, slots=True)
class CachePart:
    """Where a layer's keys and values [num_kv_heads, capacity, head_dim] begin in a slot, in elements."""

    keys: int
    values: int
    num_kv_heads: int
    head_dim: int


class GpuKvCache:
    """memory: [num_slots, elements of a slot] of dtype, on the device, 0 at first: what decode's captured
    launches name as read is all of it. parts: of each layer, None for layers without attention.

    Raises OutOfDeviceMemoryError.
    """

    __slots__ = ("_device", "_staging", "_views", "capacity", "dtype", "memory", "num_slots", "parts")

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
        self.capacity, self.dtype, self.num_slots = capacity, dtype, num_slots
        self.parts: list[CachePart | None] = []
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        end = 0
        for layer in spec.layers:
            mixer = layer.mixer
            if not isinstance(mixer, Attention):
                self.parts.append(None)
                continue
            size = mixer.kv_heads * capacity * mixer.head_dim
            self.parts.append(CachePart(end, end + size, mixer.kv_heads, mixer.head_dim))
            end += 2 * size
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
        """(keys, values) [num_kv_heads, capacity, head_dim] of a layer: views, made once."""
        found = self._views.get((slot, layer))
        if found is None:
            part = self.part(layer)
            shape = (part.num_kv_heads, self.capacity, part.head_dim)
            size = part.values - part.keys
            keys, values = (self.memory[slot, begin : begin + size] for begin in (part.keys, part.values))
            found = self._views[slot, layer] = (keys.view(shape), values.view(shape))
        return found

    def slot_address(self, slot: int) -> int:
        """Where a slot's memory begins on the device."""
        return self.memory.data_ptr() + slot * self.memory.stride(0) * ITEM_BYTES

    def layers(self, slot: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``layer`` of every layer with attention."""
        return [self.layer(slot, index) for index, part in enumerate(self.parts) if part is not None]

    def read(self, stream: Stream, slot: int, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """Keys and values of positions 0..num_tokens-1, [num_kv_heads, num_tokens, head_dim], bf16 as uint16
        bits.

        In a pinned buffer that the next call overwrites. stream: after whatever wrote them.
        """
        staging = self._rows(self.part(layer), num_tokens)
        self._device.host_writes(staging)
        for rows, cache in zip(staging, self.layer(slot, layer), strict=True):
            for head in range(rows.shape[0]):
                stream.copy(rows[head], cache[head, :num_tokens])
        stream.synchronize()
        self._device.host_reads(staging)
        keys, values = staging.view(torch.int16).numpy().view(numpy_dtype(self.dtype))
        return keys, values

    def write(self, stream: Stream, slot: int, layer: int, keys: KvRows, values: KvRows) -> None:
        """Writes positions from 0 on; returns when they have arrived."""
        staging = self._rows(self.part(layer), keys.shape[1])
        self._device.host_writes(staging)
        host = staging.view(torch.int16).numpy().view(numpy_dtype(self.dtype))
        np.copyto(host[0], keys)
        np.copyto(host[1], values)
        for rows, cache in zip(staging, self.layer(slot, layer), strict=True):
            for head in range(rows.shape[0]):
                stream.copy(cache[head, : keys.shape[1]], rows[head])
        stream.synchronize()

    def _rows(self, part: CachePart, num_tokens: int) -> torch.Tensor:
        """Pinned [2, num_kv_heads, num_tokens, head_dim]: made for the whole
        capacity when first asked for.
        """
        if self._staging is None:
            most = max(2 * (one.values - one.keys) for one in self.parts if one is not None)
            self._staging = self._device.pinned((most,), self.dtype)
        size = 2 * part.num_kv_heads * num_tokens * part.head_dim
        return self._staging[:size].view(2, part.num_kv_heads, num_tokens, part.head_dim)
