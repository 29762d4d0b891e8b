"""An arena: one exact-size piece of anonymous memory that the experts are read into."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from krasis.runtime.host_memory.experts import Experts
from krasis.runtime.host_memory.memory import anonymous
from krasis.runtime.host_memory.shards import Shards

Bytes = npt.NDArray[np.uint8]


class ArenaSource:
    """See ``pinned_store.Source``. Raises ResourceError if the memory cannot be mapped."""

    read_only = False
    in_place_bytes = 0

    def __init__(self, experts: Experts, shards: Shards) -> None:
        self._experts, self._shards = experts, shards
        self._memory: Bytes | None = anonymous(experts.num_bytes, where="arena of experts")

    @property
    def direct_bytes(self) -> int:
        """Read past the page cache."""
        return self._shards.direct_bytes

    @property
    def cached_bytes(self) -> int:
        """Read through it."""
        return self._shards.cached_bytes

    def memory(self, layer: int) -> Bytes:
        """See ``pinned_store.Source``."""
        experts = self._experts
        if self._memory is None:
            return np.empty((0, experts.record_bytes), np.uint8)
        begin = layer * experts.layer_bytes
        flat = self._memory[begin : begin + experts.layer_bytes]
        return flat.reshape(experts.num_experts, experts.record_bytes)

    def fill(self, layer: int, begin: int, end: int) -> None:
        """See ``pinned_store.Source``."""
        self._shards.read(layer, begin, self.memory(layer).reshape(-1)[begin:end])

    def replacement(self, layer: int, first: int, count: int) -> Bytes | None:
        """Anonymous memory that is refused has no substitute."""
        return None

    def close(self) -> None:
        """See ``pinned_store.Source``."""
        self._memory = None
        self._shards.close()
