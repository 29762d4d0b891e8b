"""The double's memory: poison, accounting, guards, pinned and registered memory, undeclared accesses."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from krasis.formats.errors import OutOfDeviceMemoryError, UsageError
from krasis.runtime.device.double import DeviceDouble, OrderingError

HostValues = Callable[..., torch.Tensor]


def test_new_memory_is_poison(device: DeviceDouble) -> None:
    assert device.empty((3, 5), torch.float32).isnan().all()
    assert device.empty((4,), torch.bfloat16).isnan().all()
    assert (device.empty((4,), torch.uint8) == 0xCD).all()
    assert device.pinned((4,), torch.float16).isnan().all()
    assert device.empty((0, 4), torch.int32).shape == (0, 4)
    assert device.empty((), torch.float32).shape == ()
    assert device.empty((5,), torch.int8).data_ptr() % 512 == 0


def test_memory_is_counted_and_freed_with_the_last_view() -> None:
    device = DeviceDouble(total_bytes=4096)
    first = device.empty((512,), torch.float32)
    assert device.free_bytes() == 2048
    view = first[10:20]
    with pytest.raises(OutOfDeviceMemoryError, match="limit 4096 bytes"):
        device.empty((2049,), torch.uint8)
    del first
    gc.collect()
    assert device.free_bytes() == 2048
    del view
    gc.collect()
    assert device.free_bytes() == 4096
    assert device.empty((4096,), torch.uint8).shape == (4096,)
    assert device.peak_bytes == 4096


def test_memory_of_queued_work_is_not_counted_against_new_memory(host_values: HostValues) -> None:
    device = DeviceDouble(policy="late", total_bytes=1024)
    stream = device.stream("compute")
    for _ in range(3):
        temporary = device.empty((256,), torch.float32)
        stream.copy(temporary, host_values(device, [1.0] * 256))
        del temporary
    device.close()


def test_refused_launches_run_out_of_memory(host_values: HostValues) -> None:
    device = DeviceDouble(refuse=lambda name: name == "attention")
    stream = device.stream("compute")
    target = device.empty((4,), torch.float32)
    with pytest.raises(OutOfDeviceMemoryError, match="attention"):
        stream.launch("attention", lambda _: None, reads=[], writes=[target])
    stream.launch("other", lambda _: None, reads=[], writes=[target])
    device.close()


def test_ordinary_memory_is_refused(device: DeviceDouble, host_values: HostValues) -> None:
    stream = device.stream("copies")
    target, ordinary = device.empty((4,), torch.float32), torch.zeros(4)
    with pytest.raises(UsageError, match="neither device memory nor pinned"):
        stream.copy(target, ordinary)
    with pytest.raises(UsageError, match="neither device memory nor pinned"):
        stream.launch("read", lambda _: None, reads=[ordinary], writes=[target])
    with pytest.raises(UsageError, match="host to host"):
        stream.copy(device.pinned((4,), torch.float32), host_values(device, [1.0] * 4))
    with pytest.raises(UsageError, match="equal shapes"):
        stream.copy(target, host_values(device, [1.0] * 3))
    with pytest.raises(UsageError, match="contiguous"):
        stream.copy(device.empty((4, 4), torch.float32)[:, 0], host_values(device, [1.0] * 4))
    with pytest.raises(UsageError, match="cannot touch device memory"):
        device.host_reads(target)


def test_registered_memory_is_pinned_until_it_is_not(device: DeviceDouble) -> None:
    stream = device.stream("copies")
    memory, target = torch.arange(64, dtype=torch.uint8), device.empty((16,), torch.uint8)
    device.register_host(memory, read_only=True)
    stream.copy(target, memory[16:32])
    with pytest.raises(UsageError, match="already"):
        device.register_host(memory[8:24])
    with pytest.raises(OrderingError, match="copy on stream copies reads"):
        device.unregister_host(memory)
    stream.synchronize()
    device.unregister_host(memory)
    with pytest.raises(UsageError, match="not registered"):
        device.unregister_host(memory)
    with pytest.raises(UsageError, match="neither device memory nor pinned"):
        stream.copy(target, memory[16:32])
    assert target.tolist() == list(range(16, 32))


def test_registered_memory_may_mean_nothing_yet(device: DeviceDouble) -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    device.register_host(memory, is_filled=False)
    stream, target = device.stream("copies"), device.empty((32,), torch.uint8)
    with pytest.raises(OrderingError, match="never written"):
        stream.copy(target, memory[:32])
    device.host_writes(memory[:32])
    stream.copy(target, memory[:32])
    with pytest.raises(OrderingError, match=r"bytes \[32, 64\)"):
        stream.copy(target, memory[32:])


def test_what_a_launch_did_not_name_is_noticed() -> None:
    device = DeviceDouble(paranoid=True)
    stream = device.stream("compute")
    named, other = (device.empty((8,), torch.float32) for _ in range(2))
    stream.launch("fill", lambda _: other.fill_(3.0), reads=[], writes=[other])
    stream.launch("sum", lambda _: named.copy_(other), reads=[], writes=[named])
    device.synchronize()
    assert named.isnan().all()  # an undeclared read sees poison
    assert other.tolist() == [3.0] * 8
    stream.launch("stray", lambda _: other[2].zero_(), reads=[], writes=[named])
    with pytest.raises(OrderingError, match="stray on stream compute wrote memory that it did not name"):
        device.synchronize()
    assert other.tolist() == [3.0] * 8


def test_writes_past_the_end_are_noticed(device: DeviceDouble) -> None:
    import ctypes

    stream, target = device.stream("compute"), device.empty((8,), torch.uint8)
    stream.launch("overrun", lambda _: ctypes.memset(target.data_ptr(), 0, 9), reads=[], writes=[target])
    with pytest.raises(OrderingError, match=r"outside of an allocation|device memory"):
        device.synchronize()
    device.synchronize()


def test_an_action_that_fails_says_which_it_was() -> None:
    device = DeviceDouble(policy="late")
    stream, target = device.stream("compute"), device.empty((8,), torch.float32)
    stream.launch("divide", lambda _: 1 // 0, reads=[], writes=[target])
    with pytest.raises(ZeroDivisionError) as caught:
        stream.synchronize()
    assert "divide on stream compute" in caught.value.__notes__[0]
    device.close()


def test_a_closed_device_refuses_work(device: DeviceDouble) -> None:
    stream, target = device.stream("compute"), device.empty((8,), torch.float32)
    device.close()
    device.close()
    with pytest.raises(UsageError, match="closed"):
        stream.launch("late", lambda _: None, reads=[], writes=[target])
    with pytest.raises(UsageError, match="closed"):
        device.empty((1,), torch.float32)
