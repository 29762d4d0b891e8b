"""Experts in pinned memory of a device, for tests of what copies them from there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy.typing as npt
import torch

from krasis.runtime.device.api import Device, Event
from krasis.runtime.host_memory.api import PinnedExperts

Array = npt.NDArray[Any]


class HostStore:
    """An ``ExpertStore`` of all experts, pinned where they are. progress: what ``load_progress`` says."""

    method = "arena"

    def __init__(self, device: Device, records: Sequence[Array]) -> None:
        self.record_bytes = records[0].shape[1]
        self.first_expert, self.num_experts = 0, records[0].shape[0]
        self._layers = []
        for layer in records:
            pinned = device.pinned(layer.shape, torch.uint8)
            device.host_writes(pinned)
            pinned.numpy()[:] = layer
            self._layers.append(pinned)
        self.progress = (1, 1)
        self.expected: list[tuple[int, int, int]] = []
        self.held: list[tuple[PinnedExperts, Event]] = []

    def load_progress(self) -> tuple[int, int]:
        return self.progress

    def expect(self, groups: Iterable[tuple[int, int, int]]) -> None:
        self.expected.extend(groups)

    def acquire(self, layer: int, first: int, count: int) -> PinnedExperts:
        return PinnedExperts(layer, first, count, (self._layers[layer][first : first + count],))

    def release(self, piece: PinnedExperts, event: Event) -> None:
        self.held.append((piece, event))
