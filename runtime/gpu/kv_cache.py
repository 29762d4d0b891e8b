"""What sequences keep on the device, by slot: a sequence's memory, in which each layer with attention has its
keys and values, of 16 bits or of 8 with scales, and behind them each layer of the gated delta rule its state,
float32. Of layers for which VRAM has no room keys and values lie in the host's memory; layers with a window
have rings (``kv_rings``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import NativeError
from krasis.formats.limits import align_up
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.state import SNAPSHOTS
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.cache_parts import F32_BYTES, CachePart, cache_layout
from krasis.runtime.gpu.kernels.dtypes import numpy_dtype
from krasis.runtime.gpu.kv_rings import copied_bytes
from krasis.runtime.gpu.kv_staging import KvStaging
from krasis.runtime.planning.kv_form import kv_scratch_bytes
from krasis.runtime.state.recurrent_places import RecurrentPlace, recurrent_places

KvRows = npt.NDArray[Any]
_ALIGN_BYTES = 256


class GpuKvCache:
    """memory: [num_slots, bytes of a slot], on the device, 0 at first: what decode's captured launches name
    as read is all of it. dtype: of keys and values of 16 bits; with eight_bits those of attention are int8
    instead. scratch: bytes for floats of codes while a pass attends, where there are codes. parts: of each
    layer, None for layers without attention. recurrent: where a layer's state lies among a slot's
    fixed_bytes, None for layers without one. copies: [num_slots, SNAPSHOTS, bytes], of fixed bytes at
    other positions, or of the ends of windows. borders: positions of a slot at which the pass that is to come
    copies its state, each with the number of its copy. host_layers: the numbers of layers whose keys and
    values lie in host_memory instead, [num_slots, bytes of a slot], pinned, which kernels of decode read
    where it is; passes do in staging; by default the cache makes it. rings: whether layers with a window
    have such.

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
        "host_memory",
        "memory",
        "num_slots",
        "parts",
        "recurrent",
        "scratch",
        "staging",
    )

    def __init__(
        self,
        device: Device,
        stream: Stream,
        spec: ModelSpec,
        capacity: int,
        dtype: torch.dtype,
        num_slots: int = 1,
        *,
        eight_bits: bool = False,
        host_layers: Collection[int] = (),
        host_memory: torch.Tensor | None = None,
        rings: bool = False,
    ) -> None:
        self._device = device
        self._staging: torch.Tensor | None = None
        self._fixed_staging: torch.Tensor | None = None
        self.capacity, self.dtype, self.num_slots = capacity, dtype, num_slots
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}
        layout = cache_layout(spec, capacity, eight_bits=eight_bits, host_layers=host_layers, rings=rings)
        self.parts, end = layout.parts, layout.device_bytes
        self.recurrent = recurrent_places(spec)
        self.fixed_bytes = sum(place.num_bytes for place in self.recurrent if place is not None)
        self._fixed_begin = end
        if self.fixed_bytes:
            self._fixed_begin = align_up(end, _ALIGN_BYTES)
            end = align_up(self._fixed_begin + self.fixed_bytes, _ALIGN_BYTES)
        self.borders: dict[int, dict[int, int]] = {}
        self.copies = device.empty((num_slots, SNAPSHOTS, self._copy_bytes), torch.uint8)
        self.memory = device.empty((num_slots, end), torch.uint8)
        self.scratch = device.empty((kv_scratch_bytes(spec, capacity) if eight_bits else 0,), torch.uint8)
        memory = self.memory

        def clear(_: int) -> None:
            memory.zero_()

        stream.launch("clear KV cache", clear, reads=(), writes=(memory,))
        self.host_memory: torch.Tensor | None = None
        self.staging: KvStaging | None = None
        if layout.host_bytes:
            if host_memory is None:
                host_memory = device.pinned((num_slots, layout.host_bytes), torch.uint8)
            self.host_memory = host_memory
            device.host_writes(host_memory)
            host_memory.zero_()
            self.staging = KvStaging(device, stream, self.parts, capacity, dtype, self._kept)

    @property
    def ring_parts(self) -> dict[int, CachePart]:
        """Layers that have a ring."""
        return {layer: part for layer, part in enumerate(self.parts) if part is not None and part.ring}

    @property
    def _copy_bytes(self) -> int:
        return self.fixed_bytes + sum(copied_bytes(part) for part in self.ring_parts.values())

    def part(self, layer: int) -> CachePart:
        """A layer's part of a slot. Raises NativeError for a layer without attention."""
        part = self.parts[layer]
        if part is None:
            raise NativeError("the layer keeps no keys and values", where="KV cache", got=layer)
        return part

    def layer(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of a layer, as its part says: views, made once."""
        keys, values = self._kept(slot, layer)[:2]
        return keys, values

    def scales(self, slot: int, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Those of a layer's keys and values, float32 [num_kv_heads, capacity, 1]; None for 16-bit ones."""
        kept = self._kept(slot, layer)
        return (kept[2], kept[3]) if len(kept) > 2 else None

    def pairs(self, slot: int, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """All that a layer keeps, in pairs of views of one shape [heads, capacity, channels]: keys and
        values, and their scales where they have such; or the halves of latents, and of an index's keys."""
        keys, values, *scales = self._kept(slot, layer)
        if self.part(layer).is_latent:
            halves = [one.chunk(2, dim=2) for one in (keys, values) if one.numel()]
            return [(low, high) for low, high in halves]
        return [(keys, values), *([(scales[0], scales[1])] if scales else [])]

    @property
    def keeps_index(self) -> bool:
        """Whether layers keep keys of an index over tokens as the values of latents."""
        return any(part is not None and part.is_indexed for part in self.parts)

    def _kept(self, slot: int, layer: int) -> list[torch.Tensor]:
        """Keys and values, then their scales if they have such."""
        found = self._views.get((slot, layer))
        if found is not None:
            return found
        part = self.part(layer)
        memory = self.host_memory if part.on_host and self.host_memory is not None else self.memory
        found = part.views(memory[slot], self.capacity, self.dtype)
        self._views[slot, layer] = found
        return found

    def slot_address(self, slot: int, *, on_host: bool = False) -> int:
        """Where a slot's memory begins, on the device, or the host's, which has that address there, too."""
        memory = self.host_memory if on_host and self.host_memory is not None else self.memory
        return memory.data_ptr() + slot * memory.stride(0)

    def settle(self, stream: Stream) -> None:
        """What is submitted to stream from here on runs after the copies of passes to and from the host's
        memory."""
        if self.staging is not None:
            self.staging.settle(stream)

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
        """A layer's state as it is now, but for its hashed table's, becomes its part of a slot's copy."""
        place = self.place(layer)
        num_bytes = place.table_bytes if place.num_table else place.num_bytes
        own = slice(place.offset_bytes, place.offset_bytes + num_bytes)
        stream.copy(self.copies[slot, number, own], self.fixed(slot)[own])

    def copy_table(self, stream: Stream, slot: int, layer: int, number: int) -> None:
        """As ``copy_state``, of a layer's hashed table."""
        place = self.place(layer)
        own = slice(place.offset_bytes + place.table_bytes, place.offset_bytes + place.num_bytes)
        stream.copy(self.copies[slot, number, own], self.fixed(slot)[own])

    def table(self, slot: int, layer: int) -> torch.Tensor:
        """What a layer's hashed table keeps, float32, flat: a view."""
        place = self.place(layer)
        begin = place.offset_bytes + place.table_bytes
        return self.fixed(slot)[begin : begin + F32_BYTES * place.num_table].view(torch.float32)

    def table_offset(self, layer: int) -> int:
        """Bytes from a slot's address to it."""
        place = self.place(layer)
        return self._fixed_begin + place.offset_bytes + place.table_bytes

    def fixed(self, slot: int) -> torch.Tensor:
        """A slot's fixed bytes, uint8."""
        return self.memory[slot, self._fixed_begin : self._fixed_begin + self.fixed_bytes]

    def _split(
        self, fixed: torch.Tensor, place: RecurrentPlace, *, whole: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrices and columns; whole: and behind these what a hashed table keeps."""
        begin, middle = place.offset_bytes, place.offset_bytes + place.columns_bytes
        num_after = place.num_after if whole else math.prod(place.columns)
        ends = begin + F32_BYTES * math.prod(place.matrices), middle + F32_BYTES * num_after
        return fixed[begin : ends[0]].view(torch.float32), fixed[middle : ends[1]].view(torch.float32)

    def layers(self, slot: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``pairs`` of every layer with attention."""
        kept = (index for index, part in enumerate(self.parts) if part is not None)
        return [pair for index in kept for pair in self.pairs(slot, index)]

    def read(self, stream: Stream, slot: int, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """Keys and values of positions 0..num_tokens-1, [num_kv_heads, num_tokens, head_dim or value_dim],
        bf16 as uint16 bits; those of 8 bits as bytes, each row's codes and then its scale (``RowForm``).

        In a pinned buffer that the next call overwrites. stream: after whatever wrote them.
        """
        kept = self._kept(slot, layer)
        if self.part(layer).on_host:
            staging = [rows[:, :num_tokens] for rows in kept]
            stream.synchronize()
            return self._arrays(staging)
        return self.read_pieces(stream, [[rows[:, :num_tokens] for rows in kept]])

    def read_pieces(self, stream: Stream, pieces: Sequence[Sequence[torch.Tensor]]) -> tuple[KvRows, KvRows]:
        """As ``read``, of positions that lie in several places, given as views of what is kept there."""
        lengths = [piece[0].shape[1] for piece in pieces]
        staging, begin = self._rows(pieces[0], sum(lengths)), 0
        self._device.host_writes(*staging)
        for piece, count in zip(pieces, lengths, strict=True):
            for rows, cache in zip(staging, piece, strict=True):
                for head in range(rows.shape[0] if cache.numel() else 0):
                    stream.copy(rows[head, begin : begin + count], cache[head])
            begin += count
        stream.synchronize()
        return self._arrays(staging)

    def _arrays(self, staging: Sequence[torch.Tensor]) -> tuple[KvRows, KvRows]:
        self._device.host_reads(*staging)
        keys, values, *scales = (np.ascontiguousarray(self._array(rows)) for rows in staging)
        if scales:
            keys, values = (np.concatenate(both, axis=2) for both in zip((keys, values), scales, strict=True))
        return keys, values

    def write(
        self, stream: Stream, slot: int, layer: int, keys: KvRows, values: KvRows, first: int = 0
    ) -> None:
        """Writes positions from ``first`` on (0 but for rings), as ``read`` gives them; of a ring the last
        that have room. Returns when they have arrived."""
        kept, num_tokens = self._kept(slot, layer), keys.shape[1]
        part = self.part(layer)
        on_host = part.on_host
        if on_host:
            stream.synchronize()
            staging = [rows[:, :num_tokens] for rows in kept]
        else:
            staging = self._rows(kept, num_tokens)
        self._device.host_writes(*staging)
        given = [keys, values]
        if len(kept) > len(given):
            dim = part.head_dim
            given = [*(rows[..., :dim] for rows in given), *(rows[..., dim:] for rows in given)]
        for rows, own in zip(staging, given, strict=True):
            np.copyto(self._array(rows), own)
        if on_host:
            return
        begin = max(0, num_tokens - part.ring) if part.ring else 0
        for span in part.ranges(first + begin, first + num_tokens):
            end = begin + span.stop - span.start
            for rows, cache in zip(staging, kept, strict=True):
                for head in range(rows.shape[0] if rows.numel() else 0):
                    stream.copy(cache[head, span], rows[head, begin:end])
            begin = end
        stream.synchronize()

    def read_state(self, stream: Stream, fixed: torch.Tensor, layer: int) -> tuple[KvRows, KvRows]:
        """A layer's state in fixed bytes, a slot's or a copy's, as ``RecurrentPlace.exported`` says, in a
        pinned buffer that the next call overwrites."""
        place = self.place(layer)
        staging = self._state_rows(place)
        self._device.host_writes(*staging)
        for rows, state in zip(staging, self._split(fixed, place, whole=True), strict=True):
            stream.copy(rows, state)
        stream.synchronize()
        self._device.host_reads(*staging)
        return replace(place, offset_bytes=0).exported(self._state_bytes().numpy())

    def write_state(self, stream: Stream, slot: int, layer: int, matrices: KvRows, columns: KvRows) -> None:
        """Writes what ``read_state`` gave; returns when it has arrived."""
        staging = self._state_rows(self.place(layer))
        self._device.host_writes(*staging)
        place = replace(self.place(layer), offset_bytes=0)
        place.take(self._state_bytes().numpy(), matrices, columns)
        states = self._split(self.fixed(slot), self.place(layer), whole=True)
        for rows, state in zip(staging, states, strict=True):
            stream.copy(state, rows)
        stream.synchronize()

    def _state_rows(self, place: RecurrentPlace) -> tuple[torch.Tensor, torch.Tensor]:
        """Pinned room for one layer's state."""
        return self._split(self._state_bytes(), replace(place, offset_bytes=0), whole=True)

    def _state_bytes(self) -> torch.Tensor:
        """Pinned room for the largest state: made when first asked for."""
        if self._fixed_staging is None:
            most = max(one.num_bytes for one in self.recurrent if one is not None)
            self._fixed_staging = self._device.pinned((most,), torch.uint8)
        return self._fixed_staging

    def _array(self, rows: torch.Tensor) -> KvRows:
        if rows.dtype == self.dtype:
            return rows.view(torch.int16).numpy().view(numpy_dtype(self.dtype))
        return rows.view(torch.uint8).numpy()

    def _rows(self, kept: Sequence[torch.Tensor], num_tokens: int) -> list[torch.Tensor]:
        """Pinned, of num_tokens positions of what a layer keeps: made for the whole capacity when first asked
        for."""
        if self._staging is None:
            most = max(one.row_bytes for one in self.parts if one is not None)
            self._staging = self._device.pinned((most * self.capacity,), torch.uint8)
        found, end = [], 0
        for tensor in kept:
            heads, _, dim = tensor.shape
            begin, end = end, end + heads * num_tokens * dim * tensor.element_size()
            found.append(self._staging[begin:end].view(tensor.dtype).view(heads, num_tokens, dim))
        return found
