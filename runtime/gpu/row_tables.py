"""What decode's kernels read of where a token's sequence is kept: its position and its slot's addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from krasis.runtime.device.api import Device
from krasis.runtime.gpu.kernels.attention_rows import ROW_WORDS, CacheRows
from krasis.runtime.gpu.kv_cache import GpuKvCache


@dataclass(frozen=True, slots=True)
class TokenTables:
    """Tables [rows, ROW_WORDS] of int64 on the device, as ``CacheRows`` has them: of slots in VRAM; for
    layers that lie in the host's memory of slots there, and of a buffer in VRAM, of the first row alone. None
    where no layer does."""

    device: torch.Tensor
    host: torch.Tensor | None = None
    staging: torch.Tensor | None = None

    def place(self, cache: GpuKvCache, layer: int) -> CacheRows:
        """Where a layer keeps what it keeps of the rows."""
        part, table, memory = cache.part(layer), self.device, cache.memory
        if part.on_host and self.host is not None and cache.host_memory is not None:
            table, memory = self.host, cache.host_memory
        return CacheRows(
            table,
            (memory,),
            part.keys,
            part.values,
            cache.capacity,
            has_scales=part.has_scales,
            ring=part.ring,
        )


class RowTables:
    """The tables of up to max_rows rows, and where the host writes them for each token."""

    def __init__(self, device: Device, cache: GpuKvCache, max_rows: int) -> None:
        self._device, self._cache = device, cache
        count = 1 if cache.host_memory is None else 3
        self._tables = device.empty((count, max_rows, ROW_WORDS), torch.int64)
        self._given = device.pinned((count, max_rows, ROW_WORDS), torch.int64)

    def set(self, rows: Sequence[tuple[int, int]]) -> None:
        """(position, slot) of each row of the next token; nothing may be reading the last ones."""
        self._device.host_writes(self._given)
        tables, cache = self._given.numpy(), self._cache
        for index, (position, slot) in enumerate(rows):
            addresses = [cache.slot_address(slot)]
            if cache.staging is not None:
                addresses += [cache.slot_address(slot, on_host=True), cache.staging.memory.data_ptr()]
            for table, address in zip(tables, addresses, strict=True):
                table[index] = (position, address, address)

    def inputs(self, num_rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(table on the device, where it is copied from), to be copied for each token."""
        pairs = zip(self._tables, self._given, strict=True)
        return [(table[:num_rows], given[:num_rows]) for table, given in pairs]

    def of(self, num_rows: int) -> TokenTables:
        """Those of the rows on the device."""
        return TokenTables(*(table[:num_rows] for table in self._tables))

    @contextmanager
    def of_nobody(self, num_rows: int) -> Iterator[None]:
        """Inside of it no row changes what a sequence keeps: a state would have met its token twice."""
        given = self._given[:, :num_rows]
        kept = given[:, :, 0].clone()
        self._device.host_writes(given)
        given[:, :, 0] = -1
        yield
        self._device.host_writes(given)
        given[:, :, 0] = kept
