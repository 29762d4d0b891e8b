"""Wrapper of the kernel that copies a sequence's keys and values between the host's memory and VRAM."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import I64, aligned, pointer, require
from krasis.runtime.gpu.kernels.attention_rows import ROW_WORDS, CacheRows
from krasis.runtime.gpu.kernels.launcher import Launcher
from krasis.runtime.gpu.kernels.native import MoveArgs


@dataclass(frozen=True, slots=True)
class Moved:
    """What a layer keeps of a position. key_bytes, value_bytes: of a head, without scales; 0: no values.
    window: positions that are seen; None for all."""

    num_kv_heads: int
    key_bytes: int
    value_bytes: int
    window: int | None = None


class MoveKernels(Launcher):
    """Copies of which only the device knows the length."""

    def move_positions(
        self,
        stream: Stream,
        moved: Moved,
        source: CacheRows,
        to: CacheRows,
        part: int = 0,
        num_parts: int = 0,
    ) -> None:
        """The positions before the one that the first row of source is at, or a part of them; with num_parts
        0 that one alone. source, to: places of one layer, of equal capacity."""
        where = "move_positions"
        require(source.capacity == to.capacity, "capacities differ", where, to.capacity, source.capacity)
        args = MoveArgs(
            from_row=pointer(source.table[:1], (1, ROW_WORDS), I64, f"{where}.source"),
            to_row=pointer(to.table[:1], (1, ROW_WORDS), I64, f"{where}.to"),
            from_keys=aligned(source.keys_offset, f"{where}.keys"),
            from_values=aligned(source.values_offset, f"{where}.values"),
            to_keys=aligned(to.keys_offset, f"{where}.keys"),
            to_values=aligned(to.values_offset, f"{where}.values"),
            num_kv_heads=moved.num_kv_heads,
            capacity=source.capacity,
            key_bytes=moved.key_bytes,
            value_bytes=moved.value_bytes,
            window=moved.window or 0,
            part=part,
            num_parts=num_parts,
            has_scales=int(source.has_scales),
        )
        reads = (source.table[:1], to.table[:1], *source.memory)
        self.submit(stream, where, (byref(args),), reads, to.memory)
