"""Pinned memory of the real device with a fake driver: what is registered, checked and given back."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from krasis.formats.errors import ResourceError, UsageError
from krasis.runtime.device import cuda
from krasis.runtime.device.cuda import CudaDevice
from krasis.runtime.gpu.opening import open_device
from krasis.runtime.planning import assumptions
from krasis.runtime.settings import EngineSettings

GIB = 2**30


class FakeDriver:
    """The part of libkrasis_cuda that registers host memory. shift: device addresses differ by so much."""

    def __init__(self, shift: int = 0, status: int = 0) -> None:
        self.registered: dict[int, int] = {}

        def register(address: int, num_bytes: int, read_only: int) -> int:
            if not status:
                self.registered[address] = num_bytes
            return status

        def unregister(address: int) -> int:
            del self.registered[address]
            return 0

        def device_address(address: int, found: Any) -> int:
            ctypes.cast(found, ctypes.POINTER(ctypes.c_void_p))[0] = address + shift
            return 0

        self.krasis_cuda_host_register = register
        self.krasis_cuda_host_unregister = unregister
        self.krasis_cuda_host_device_address = device_address

    def krasis_cuda_last_error(self) -> bytes:
        return b"out of locked memory"


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces what needs a GPU; collects the limits set for torch's allocator."""
    found: list[float] = []
    properties = SimpleNamespace(name="Fake", major=8, minor=9, total_memory=16 * GIB)
    fakes = {
        "get_device_properties": lambda _: properties,
        "set_per_process_memory_fraction": lambda fraction, _: found.append(fraction),
        "device": lambda _: nullcontext(),
        "synchronize": lambda _: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda _: (10 * GIB, 16 * GIB),
        "memory_allocated": lambda _: 2 * GIB,
        "memory_reserved": lambda _: 5 * GIB,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda, "_check_gpu", lambda _: None)
    return found


def make(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, **options: Any) -> CudaDevice:
    monkeypatch.setattr(cuda, "cuda_library", lambda: driver)
    return CudaDevice(0, **options)


def test_whole_pages_are_registered_and_given_back(
    monkeypatch: pytest.MonkeyPatch, fractions: list[float]
) -> None:
    driver = FakeDriver()
    device = make(monkeypatch, driver)
    odd, flags = device.pinned((4097, 3), torch.int8), device.flags(2)
    assert odd.shape == (4097, 3)
    assert flags.tolist() == [0, 0]
    assert driver.registered == {odd.data_ptr(): 4 * 4096, flags.data_ptr(): 4096}
    assert device.pinned((0, 3), torch.float32).shape == (0, 3)
    odd.fill_(5)
    device.close()
    device.close()
    assert driver.registered == {}
    assert int(odd.sum(dtype=torch.int64)) == 5 * 3 * 4097  # the memory itself lives as long as its tensor
    assert fractions == []


def test_what_the_driver_refuses_is_explained(
    monkeypatch: pytest.MonkeyPatch, fractions: list[float]
) -> None:
    device = make(monkeypatch, FakeDriver(status=100))
    with pytest.raises(ResourceError, match="out of locked memory"):
        device.pinned((8,), torch.float32)
    driver = FakeDriver(shift=4096)
    device = make(monkeypatch, driver)
    with pytest.raises(ResourceError, match="another address on the device"):
        device.pinned((8,), torch.float32)
    device.close()
    assert driver.registered == {}


def test_a_cap_limits_torch_and_what_counts_as_free(
    monkeypatch: pytest.MonkeyPatch, fractions: list[float]
) -> None:
    free = make(monkeypatch, FakeDriver())
    assert (free.total_bytes, free.free_bytes()) == (16 * GIB, 13 * GIB)
    # 2 GiB that others of this process hold do not count against the cap; what comes on top of them does.
    capped = make(monkeypatch, FakeDriver(), vram_bytes=4 * GIB)
    assert (capped.total_bytes, capped.free_bytes()) == (4 * GIB, 4 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * GIB)
    assert capped.free_bytes() == 3 * GIB
    assert "4.0 GiB by setting" in capped.description
    capped.close()
    assert fractions == [6 / 16, 1.0]


def test_a_cap_leaves_room_for_what_torch_does_not_count(
    monkeypatch: pytest.MonkeyPatch, fractions: list[float]
) -> None:
    """The CUDA context, and NCCL's buffers where there are several ranks, come out of the limit."""
    made: list[CudaDevice] = []
    monkeypatch.setattr(cuda, "cuda_library", FakeDriver)
    monkeypatch.setattr("krasis.runtime.device.library.find_cuda_library", lambda: None)
    monkeypatch.setattr("krasis.runtime.gpu.opening.find_cuda_library", lambda: None, raising=False)
    context, nccl = assumptions.GPU_CONTEXT_BYTES, assumptions.NCCL_BYTES
    for num_ranks, outside in ((1, context), (2, context + nccl), (9, context + nccl)):
        settings = EngineSettings(device="cuda", vram_bytes=4 * GIB)
        made.append(cast("CudaDevice", open_device(settings, 0, num_ranks)))
        assert made[-1].total_bytes == 4 * GIB
        assert made[-1].free_bytes() == 4 * GIB - outside
        assert fractions[-1] == (6 * GIB - outside) / (16 * GIB)
        assert "4.0 GiB by setting" in made[-1].description
    # No limit, or one beyond the GPU: its own memory, of which the context is not free.
    for vram_bytes in (None, 16 * GIB, 99 * GIB):
        whole = open_device(EngineSettings(device="cuda", vram_bytes=vram_bytes), 0, 2)
        assert whole.free_bytes() == 13 * GIB
    assert len(fractions) == 3
    with pytest.raises(ResourceError, match="leaves nothing for the model"):
        open_device(EngineSettings(device="cuda", vram_bytes=context))


def test_a_stream_tells_pinned_memory_from_ordinary(
    monkeypatch: pytest.MonkeyPatch, fractions: list[float]
) -> None:
    device = make(monkeypatch, FakeDriver())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    stream, seen = device.stream("compute"), []
    stream.launch("read", seen.append, reads=[device.pinned((8,), torch.float32)[2:5]], writes=[])
    assert seen == [7]
    with pytest.raises(UsageError, match="neither device memory nor pinned"):
        stream.launch("read", seen.append, reads=[torch.zeros(8)], writes=[])
    with pytest.raises(UsageError, match="host to host"):
        stream.copy(device.pinned((8,), torch.float32), device.pinned((8,), torch.float32))
    assert seen == [7]
