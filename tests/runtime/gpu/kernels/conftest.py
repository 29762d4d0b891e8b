"""A double that runs the real kernels as host code, or a GPU where there is one, and tensors on it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Device
from krasis.runtime.device.cuda import CudaDevice
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.device.library import double_library
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels


@pytest.fixture(scope="session")
def double_is_built() -> None:
    """Skips where the double of libkrasis_cuda was never built; a path that is named must be right."""
    try:
        double_library()
    except NativeError:
        if "KRASIS_CUDA_DOUBLE" in os.environ:
            raise
        pytest.skip("the CMake target krasis_cuda_double is not built: set KRASIS_CUDA_DOUBLE to it")


class Bench:
    """A device with one stream and its kernels."""

    def __init__(self, device: Device) -> None:
        self.device, self.stream, self.kernels = device, device.stream("compute"), GpuKernels(device)

    def put(self, values: torch.Tensor) -> torch.Tensor:
        """The same on the device."""
        staged = self.device.pinned(values.shape, values.dtype)
        self.device.host_writes(staged)
        staged.copy_(values)
        placed = self.device.empty(values.shape, values.dtype)
        self.stream.copy(placed, staged)
        return placed

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """NaN, or nonsense."""
        made = self.device.empty(shape, dtype)
        if made.is_cuda and dtype.is_floating_point:
            self.kernels.fill(self.stream, made, math.nan)
        return made

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is there once all is done."""
        staged = self.device.pinned(tensor.shape, tensor.dtype)
        self.stream.copy(staged, tensor)
        self.stream.synchronize()
        self.device.host_reads(staged)
        return staged.clone()

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
        """Normal numbers, on the host."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture(params=["double", "cuda"] if torch.cuda.is_available() else ["double"])
def bench(request: pytest.FixtureRequest) -> Iterator[Any]:
    """On the double every launch runs late, and sees only the memory it named."""
    device: Device
    if request.param == "cuda":
        device = CudaDevice()
    else:
        request.getfixturevalue("double_is_built")
        device = DeviceDouble(policy="late", paranoid=True)
    yield Bench(device)
    device.close()
