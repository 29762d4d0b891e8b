"""The keys and values of every layer, [num_layers, num_kv_heads, capacity, head_dim], memory taken as it is
used."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.architecture_record import Architecture
from krasis.formats.errors import ResourceError
from krasis.formats.process.machine_limits import available_memory_bytes

KV_NUMPY: dict[str, type[np.generic]] = {"f16": np.float16, "f32": np.float32}


class KvCache:
    """keys, values: [num_layers, num_kv_heads, capacity, head_dim]. Raises ResourceError if it cannot fit in
    RAM."""

    __slots__ = ("capacity", "dtype", "keys", "values")

    def __init__(self, architecture: Architecture, capacity: int, dtype: str) -> None:
        num_bytes = kv_cache_bytes(architecture, capacity, dtype)
        available = available_memory_bytes()
        hint = "use a smaller --ctx" + (", or --kv-dtype f16" if dtype == "f32" else "")
        if available is not None and num_bytes > available:
            raise ResourceError(
                "the KV cache does not fit in memory",
                got=f"{num_bytes} bytes",
                limit=f"{available} bytes",
                hint=hint,
            )
        shape = (architecture.num_layers, architecture.num_kv_heads, capacity, architecture.head_dim)
        self.capacity, self.dtype = capacity, dtype
        try:
            # zeros, not empty: large ones come from fresh pages, which cost nothing until a position is
            # written.
            self.keys: npt.NDArray[Any] = np.zeros(shape, dtype=KV_NUMPY[dtype])
            self.values: npt.NDArray[Any] = np.zeros(shape, dtype=KV_NUMPY[dtype])
        except MemoryError as error:
            raise ResourceError(
                "the KV cache does not fit in memory", got=f"{num_bytes} bytes", hint=hint
            ) from error

    def read(self, layer: int, num_tokens: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Copies of a layer's first positions: keys, values, each [num_kv_heads, num_tokens, head_dim]."""
        keys, values = self.keys[layer, :, :num_tokens], self.values[layer, :, :num_tokens]
        return np.ascontiguousarray(keys), np.ascontiguousarray(values)

    def write(self, layer: int, keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Copies what ``read`` gave to a layer's first positions."""
        num_tokens = keys.shape[1]
        self.keys[layer, :, :num_tokens] = keys
        self.values[layer, :, :num_tokens] = values


def kv_cache_bytes(architecture: Architecture, capacity: int, dtype: str) -> int:
    """Bytes of keys and values at full length."""
    per_position = 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim
    return per_position * capacity * np.dtype(KV_NUMPY[dtype]).itemsize
