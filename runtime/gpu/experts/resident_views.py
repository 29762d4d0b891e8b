"""Which memory the resident experts of a layer lie in: what a launch that reads them names."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.experts.schedule import runs_of
from krasis.runtime.gpu.experts.stage import Residents


class ResidentViews:
    """Views of a pool of records, slots in use only: others may be written to meanwhile.

    Made when a layer's addresses have changed: between passes most have not.
    """

    def __init__(self, residents: Residents | None, num_layers: int, num_experts: int) -> None:
        self._residents = residents
        self._nowhere = np.zeros((num_layers, num_experts), np.int64)
        self._known = self._nowhere.copy()
        self._views: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        """i64 [layers, experts]: where each expert is resident, else 0."""
        return self._nowhere if self._residents is None else self._residents.host_addresses

    def arrive(self, stream: Stream, layer: int) -> None:
        """See ``Residents``."""
        if self._residents is not None:
            self._residents.arrive(stream, layer)

    def of(self, layer: int) -> list[torch.Tensor]:
        """The memory of a layer's resident experts."""
        if self._residents is None:
            return []
        addresses = self._residents.host_addresses[layer]
        if self._residents.memory.is_cuda:
            # A GPU only cares which allocation is in use; only the double looks at bytes.
            return [self._residents.memory] if addresses.any() else []
        if not np.array_equal(addresses, self._known[layer]):
            pool = self._residents.memory
            slots = np.sort((addresses[addresses != 0] - pool.data_ptr()) // pool.stride(0))
            self._views[layer] = [pool[run.first : run.first + run.count] for run in runs_of(slots)]
            self._known[layer] = addresses
        return self._views[layer]
