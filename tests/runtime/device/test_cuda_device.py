"""The real device: without a GPU only that it says why; with one, what the double promises of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from krasis.formats.errors import OutOfDeviceMemoryError, ResourceError, UsageError
from krasis.runtime.device.cuda import CudaDevice

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
SIZE = 1 << 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why() -> None:
    with pytest.raises(ResourceError, match=r"without CUDA|no usable NVIDIA GPU"):
        CudaDevice()


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    made = CudaDevice()
    yield made
    made.close()


@needs_gpu
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ResourceError, match="no such GPU"):
        CudaDevice(1000)


@needs_gpu
def test_two_streams_and_two_buffers(device: CudaDevice) -> None:
    copies, compute = device.stream("copies"), device.stream("compute")
    source, on_host = (device.pinned((12, SIZE), torch.float32) for _ in range(2))
    source.copy_(torch.arange(12.0)[:, None].expand(12, SIZE))
    buffers, results = [device.empty((SIZE,), torch.float32) for _ in range(2)], []
    last_read = [compute.record(), compute.record()]
    for piece in range(12):
        parity, result = piece % 2, device.empty((SIZE,), torch.float32)
        buffer = buffers[parity]
        copies.wait(last_read[parity])
        copies.copy(buffer, source[piece])
        compute.wait(copies.record())

        def scale(
            _: int, piece: int = piece, result: torch.Tensor = result, buffer: torch.Tensor = buffer
        ) -> None:
            result.copy_(buffer * piece)

        compute.launch("scale", scale, reads=[buffer], writes=[result])
        last_read[parity] = compute.record()
        results.append(result)
    for piece, result in enumerate(results):
        compute.copy(on_host[piece], result)
    del buffers, buffer, results, result, scale
    done = compute.record()
    done.synchronize()
    assert done.is_done()
    expected = torch.arange(12.0).square()[:, None].expand(12, SIZE)
    assert torch.equal(on_host, expected)


@needs_gpu
def test_a_graph_is_replayed_on_any_stream(device: CudaDevice) -> None:
    stream, other = device.stream("compute"), device.stream("other")
    source, total, step = (
        device.pinned((4,), torch.float32),
        *(device.empty((4,), torch.float32) for _ in range(2)),
    )
    source.fill_(2.0)
    stream.copy(total, source)
    with device.capture(stream) as graph:
        with pytest.raises(UsageError, match="events"):
            stream.record()
        stream.copy(step, source)
        stream.launch("add", lambda _: total.add_(step), reads=[total, step], writes=[total])
    graph.replay(stream)
    stream.synchronize()
    source.fill_(3.0)
    graph.replay(other)
    other.synchronize()
    back = device.pinned((4,), torch.float32)
    other.copy(back, total)
    other.synchronize()
    assert back.tolist() == [7.0] * 4


@needs_gpu
def test_ordinary_memory_is_refused(device: CudaDevice) -> None:
    stream, target = device.stream("copies"), device.empty((4, 4), torch.float32)
    with pytest.raises(UsageError, match="neither device memory nor pinned"):
        stream.copy(target, torch.zeros(4, 4))
    with pytest.raises(UsageError, match="contiguous"):
        stream.copy(target[:, 0], device.pinned((4,), torch.float32))
    with pytest.raises(UsageError, match="neither device memory nor pinned"):
        stream.launch("read", lambda _: None, reads=[torch.zeros(4)], writes=[target])
    stream.copy(target, torch.ones(4, 4).pin_memory())
    stream.synchronize()


@needs_gpu
def test_memory_runs_out_with_our_error(device: CudaDevice) -> None:
    with pytest.raises(OutOfDeviceMemoryError):
        device.empty((2 * device.total_bytes,), torch.uint8)
    stream, target = device.stream("compute"), device.empty((4,), torch.float32)

    def hungry(_: int) -> None:
        torch.empty(2 * device.total_bytes, dtype=torch.uint8, device=device.torch_device)

    with pytest.raises(OutOfDeviceMemoryError, match="hungry"):
        stream.launch("hungry", hungry, reads=[], writes=[target])


@needs_gpu
def test_a_cap_holds_until_the_device_is_closed() -> None:
    device = CudaDevice(vram_bytes=1 << 30)
    assert device.total_bytes == 1 << 30
    assert device.free_bytes() <= 1 << 30
    with pytest.raises(OutOfDeviceMemoryError):
        device.empty((3 << 29,), torch.uint8)
    device.close()
    device.close()
    if CudaDevice().free_bytes() > 2 << 30:
        assert torch.empty(3 << 29, dtype=torch.uint8, device="cuda").numel() == 3 << 29


@needs_gpu
def test_pinned_memory_is_exact_and_reachable_at_its_address(device: CudaDevice) -> None:
    flags = device.flags(3)
    assert flags.tolist() == [0, 0, 0]
    assert flags.is_pinned()
    odd = device.pinned((4097, 3), torch.int8)
    assert odd.shape == (4097, 3)
    assert odd.is_pinned()
    device.serve(lambda: None)
