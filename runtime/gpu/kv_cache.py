"""Keys and values on the device, 16-bit, [num_layers, num_kv_heads, capacity, head_dim]."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.architecture_record import Architecture
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.kernels.dtypes import numpy_dtype

KvRows = npt.NDArray[Any]


class GpuKvCache:
    """keys, values: device tensors of dtype, 0 at first: what decode's captured launches name as read is all
    of them.

    Raises OutOfDeviceMemoryError.
    """

    __slots__ = ("_device", "_staging", "capacity", "dtype", "keys", "values")

    def __init__(
        self,
        device: Device,
        stream: Stream,
        architecture: Architecture,
        capacity: int,
        dtype: torch.dtype,
    ) -> None:
        shape = (architecture.num_layers, architecture.num_kv_heads, capacity, architecture.head_dim)
        self._device = device
        self._staging: torch.Tensor | None = None
        self.capacity, self.dtype = capacity, dtype
        self.keys = device.empty(shape, dtype)
        self.values = device.empty(shape, dtype)
        keys, values = self.keys, self.values

        def clear(_: int) -> None:
            keys.zero_()
            values.zero_()

        stream.launch("clear KV cache", clear, reads=(), writes=(keys, values))

    @property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) [num_kv_heads, capacity, head_dim] of each layer: views."""
        return list(zip(self.keys, self.values, strict=True))

    def read(self, stream: Stream, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """Keys and values of positions 0..num_tokens-1, [num_kv_heads, num_tokens, head_dim], bf16 as uint16
        bits.

        In a pinned buffer that the next call overwrites. stream: after whatever wrote them.
        """
        staging = self._rows(num_tokens)
        self._device.host_writes(staging)
        for rows, cache in zip(staging, (self.keys, self.values), strict=True):
            for head in range(rows.shape[0]):
                stream.copy(rows[head], cache[layer, head, :num_tokens])
        stream.synchronize()
        self._device.host_reads(staging)
        keys, values = staging.view(torch.int16).numpy().view(numpy_dtype(self.dtype))
        return keys, values

    def write(self, stream: Stream, layer: int, keys: KvRows, values: KvRows) -> None:
        """Writes positions from 0 on; returns when they have arrived."""
        staging = self._rows(keys.shape[1])
        self._device.host_writes(staging)
        host = staging.view(torch.int16).numpy().view(numpy_dtype(self.dtype))
        np.copyto(host[0], keys)
        np.copyto(host[1], values)
        for rows, cache in zip(staging, (self.keys, self.values), strict=True):
            for head in range(rows.shape[0]):
                stream.copy(cache[layer, head, : keys.shape[1]], rows[head])
        stream.synchronize()

    def _rows(self, num_tokens: int) -> torch.Tensor:
        """Pinned [2, num_kv_heads, num_tokens, head_dim]: made for the whole
        capacity when first asked for.
        """
        _, heads, capacity, head_dim = self.keys.shape
        if self._staging is None:
            self._staging = self._device.pinned((2 * heads * capacity * head_dim,), self.dtype)
        return self._staging[: 2 * heads * num_tokens * head_dim].view(2, heads, num_tokens, head_dim)
