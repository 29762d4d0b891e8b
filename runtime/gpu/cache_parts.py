"""Where each layer's keys and values lie in a slot: in VRAM, or in pinned memory of the host; of a layer with
a window in a ring.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from krasis.formats.limits import align_up
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import ring_positions

F32_BYTES = 4
_PART_BYTES = 16


@dataclass(frozen=True, slots=True)
class CachePart:
    """Where a layer's keys [num_kv_heads, capacity, head_dim] and values [num_kv_heads, capacity, value_dim]
    begin in a slot, in bytes. value_dim: of latents, whose values are they themselves, the channels of an
    index's keys, 0 without. has_scales: both are int8, and right behind each are float32 scales
    [num_kv_heads, capacity]. on_host: of a slot of the host's memory, else of the device's. is_latent: of
    latent attention. ring: places in place of the capacity, position p at p % ring; 0 where all positions
    have room. window: the positions that a token sees, None for all."""

    keys: int
    values: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    has_scales: bool = False
    on_host: bool = False
    is_latent: bool = False
    ring: int = 0
    window: int | None = None

    @property
    def is_indexed(self) -> bool:
        """Whether its values are the keys of an index."""
        return self.is_latent and self.value_dim > 0

    def linear(self, num_rows: int) -> CachePart:
        """The same keys and values, of so many positions one after another, from byte 0 on."""
        key_bytes = self.head_dim + F32_BYTES if self.has_scales else 2 * self.head_dim
        values = align_up(self.num_kv_heads * num_rows * key_bytes, _PART_BYTES)
        return replace(self, keys=0, values=values, ring=0)

    def ranges(self, begin: int, end: int) -> list[slice]:
        """Where positions lie, in their order; of a ring no more of them than it has places."""
        if not self.ring or begin >= end:
            return [slice(begin, max(begin, end))]
        first, count = begin % self.ring, end - begin
        last = min(first + count, self.ring)
        return [slice(first, last), *([slice(0, first + count - last)] if first + count > last else [])]

    @property
    def row_bytes(self) -> int:
        """Keys and values of a position."""
        scales = 2 * F32_BYTES if self.has_scales else 0
        item_bytes = 1 if self.has_scales else 2
        return self.num_kv_heads * ((self.head_dim + self.value_dim) * item_bytes + scales)

    def num_bytes(self, capacity: int) -> int:
        """From the first key to the last value, or its scale."""
        value_bytes = self.value_dim + F32_BYTES if self.has_scales else 2 * self.value_dim
        return self.values - self.keys + self.num_kv_heads * capacity * value_bytes

    def views(self, memory: torch.Tensor, capacity: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Keys and values in a slot's memory (uint8, flat), then their scales [num_kv_heads, capacity, 1] if
        they have such; of a ring its places. dtype: of keys and values without."""
        capacity = self.ring or capacity
        cells, shape = self.num_kv_heads * capacity, (self.num_kv_heads, capacity)
        begins = (self.keys, self.head_dim), (self.values, self.value_dim)
        kind, item_bytes = (torch.int8, 1) if self.has_scales else (dtype, 2)
        found = [
            memory[begin : begin + cells * dim * item_bytes].view(kind).view(*shape, dim)
            for begin, dim in begins
        ]
        if self.has_scales:
            ends = (begin + cells * dim for begin, dim in begins)
            found += [
                memory[end : end + cells * F32_BYTES].view(torch.float32).view(*shape, 1) for end in ends
            ]
        return found


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The layers' parts of a slot, None for layers without attention, and where they end in the device's and
    in the host's memory, in bytes."""

    parts: tuple[CachePart | None, ...]
    device_bytes: int
    host_bytes: int


def chooses(spec: ModelSpec, capacity: int) -> bool:
    """Whether slots have room for more tokens than an index over tokens picks."""
    return spec.densest_context is not None and capacity > spec.densest_context


def cache_layout(
    spec: ModelSpec,
    capacity: int,
    *,
    eight_bits: bool,
    host_layers: Collection[int] = (),
    rings: bool = False,
) -> CacheLayout:
    """Slots of so many positions. eight_bits: but for latents. host_layers: the numbers of those in the
    host's memory. rings: of layers with a window, where they are shorter."""
    parts: list[CachePart | None] = []
    ends = {False: 0, True: 0}
    for index, layer in enumerate(spec.layers):
        mixer, has_scales, on_host = layer.mixer, False, index in host_layers
        is_latent = isinstance(mixer, LatentAttention)
        ring, window = 0, None
        if isinstance(mixer, LatentAttention):
            sizes = 1, mixer.kv_rank + mixer.rope_dim, mixer.index_dim if chooses(spec, capacity) else 0
        elif isinstance(mixer, Attention):
            sizes, has_scales = (mixer.kv_heads, mixer.head_dim, mixer.head_dim), eight_bits
            window = mixer.window
            if rings and window is not None and ring_positions(window) < capacity:
                ring = ring_positions(window)
        else:
            parts.append(None)
            continue
        heads, head_dim, value_dim = sizes
        cells = heads * (ring or capacity)
        row_bytes = [dim + F32_BYTES if has_scales else 2 * dim for dim in (head_dim, value_dim)]
        values = align_up(ends[on_host] + cells * row_bytes[0], _PART_BYTES)
        shape = heads, head_dim, value_dim, has_scales, on_host, is_latent, ring, window
        parts.append(CachePart(ends[on_host], values, *shape))
        ends[on_host] = align_up(values + cells * row_bytes[1], _PART_BYTES)
    return CacheLayout(tuple(parts), ends[False], ends[True])
