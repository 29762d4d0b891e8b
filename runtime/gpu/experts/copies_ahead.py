"""Experts that a layer will likely choose, copied before its router has spoken: the link has nothing else to
do between a layer's last copy and the next layer's choice.

They lie in places of their own, one set for every other layer. When a layer's are sent for, the host has seen
the choice of the layer before, which the device made when it was done with all that read this set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Event, Stream
from krasis.runtime.gpu.experts.schedule import runs_of
from krasis.runtime.host_memory.api import ExpertStore

NUM_SETS = 2


class CopiesAhead:
    """places: uint8 [2, experts, record_bytes] on the device. stream: of copies.

    num_bytes: copied since it was made; num_used, num_copied: experts, of which so many were chosen.
    """

    def __init__(self, stream: Stream, store: ExpertStore, places: torch.Tensor) -> None:
        self._stream, self._store, self._places = stream, store, places
        self._layer = -1  # whose experts are there, or on their way
        self._experts: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._copied: Event | None = None
        self.num_bytes = self.num_copied = self.num_used = 0

    @property
    def room(self) -> int:
        """Experts of a layer."""
        return self._places.shape[1]

    def begin(self) -> None:
        """A pass begins, with the device idle: what the last one left is nothing."""
        self._layer, self._copied = -1, None

    def send(self, layer: int, experts: npt.NDArray[np.int64]) -> None:
        """Begins to copy experts, rising numbers, of a layer, behind all copies before. The host has seen the
        choice of the layer before."""
        if len(experts) > self.room or self._copied is not None:
            raise NativeError("no place ahead", where=f"layer {layer}", got=len(experts), limit=self.room)
        places, runs = self._places[layer % NUM_SETS], runs_of(experts)
        self._store.expect([(layer, run.first, run.count) for run in runs])
        pieces = []
        for run in runs:
            piece = self._store.acquire(layer, run.first, run.count)
            pieces.append(piece)
            place = run.place
            for part in piece.parts:
                self._stream.copy(places[place : place + len(part)], part)
                place += len(part)
                self.num_bytes += part.numel()
        self._copied = self._stream.record()
        for piece in pieces:
            self._store.release(piece, self._copied)
        self._layer, self._experts = layer, experts
        self.num_copied += len(experts)

    def take(
        self, layer: int, addresses: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_], compute: Stream
    ) -> tuple[npt.NDArray[np.int64], list[torch.Tensor]]:
        """(addresses [experts] of a layer's experts with those that were copied, the memory of these): what
        is submitted to compute from here on runs after their copies. chosen [experts]: by the layer."""
        if self._copied is None or self._layer != layer:
            return addresses, []
        compute.wait(self._copied)
        self._copied = None
        own = self._places[layer % NUM_SETS, : len(self._experts)]
        found = addresses.copy()
        found[self._experts] = own.data_ptr() + np.arange(len(own)) * own.stride(0)
        self.num_used += int(np.count_nonzero(chosen[self._experts]))
        return found, [own]
