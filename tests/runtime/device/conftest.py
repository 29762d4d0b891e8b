"""Doubles of devices, whatever the order of what is left open, and small programs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from krasis.runtime.device.double import DeviceDouble


@pytest.fixture(params=range(8), ids=lambda seed: f"seed{seed}")
def device(request: pytest.FixtureRequest) -> Iterator[DeviceDouble]:
    """A double; seeds 0..7 cover every policy."""
    double = DeviceDouble(request.param)
    yield double
    double.close()


@pytest.fixture
def host_values() -> Callable[..., torch.Tensor]:
    """host_values(device, [1, 2, 3]): pinned float32 memory that holds them."""

    def make(device: DeviceDouble, values: list[Any]) -> torch.Tensor:
        filled = torch.tensor(values, dtype=torch.float32)
        pinned = device.pinned(filled.shape, torch.float32)
        device.host_writes(pinned)
        pinned.copy_(filled)
        return pinned

    return make
