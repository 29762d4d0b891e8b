"""Wrappers of decode kernels: work handed to and fro by flags."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.formats.native import check
from krasis.runtime.cpu.native import prototype

TIMEOUT_NS = 20_000_000_000


def test_add_and_fill(bench: Any) -> None:
    hidden, x = bench.random(3, 8), bench.random(3, 8, seed=2)
    placed, zeroed = bench.put(hidden), bench.empty(5, dtype=torch.int32)
    bench.kernels.add(bench.stream, placed, bench.put(x))
    bench.kernels.fill(bench.stream, zeroed)
    assert torch.equal(bench.get(placed), hidden + x)
    assert bench.get(zeroed).tolist() == [0] * 5


def test_values_of_pinned_memory_are_fetched(bench: Any) -> None:
    sources = [bench.random(3, 8), torch.tensor([[7, -1, 2**40]])]
    pieces = []
    for source in sources:
        pinned = bench.device.pinned(source.shape, source.dtype)
        bench.device.host_writes(pinned)
        pinned.copy_(source)
        pieces.append((bench.empty(*source.shape, dtype=source.dtype), pinned))
    bench.kernels.fetch(bench.stream, pieces, bench.device.flags(1), bench.put(torch.tensor([5])))
    for (placed, _), source in zip(pieces, sources, strict=True):
        assert torch.equal(bench.get(placed), source)


class Handover:
    """Sends hidden to the host, which sends back 10 times as much; in split or in fused launches."""

    def __init__(self, bench: Any, hidden: torch.Tensor) -> None:
        self.bench, self.hidden = bench, bench.put(hidden)
        device = bench.device
        self.sent, self.reply = (device.pinned(hidden.shape, torch.float32) for _ in range(2))
        self.to_host, self.to_device = device.flags(1), device.flags(1)
        self.epoch, self.timeouts = bench.put(torch.tensor([0])), device.pinned((1,), torch.int64)
        device.host_writes(self.timeouts)
        self.timeouts.zero_()

    def submit(self, is_fused: bool, timeout_ns: int = TIMEOUT_NS) -> None:
        kernels, stream = self.bench.kernels, self.bench.stream
        kernels.advance(stream, self.epoch)
        if is_fused:
            kernels.send(stream, [(self.sent, self.hidden)], self.to_host, self.epoch)
            kernels.receive(
                stream, self.hidden, self.reply, self.to_device, self.epoch, timeout_ns, self.timeouts, 7
            )
        else:
            stream.copy(self.sent, self.hidden)
            kernels.signal(stream, self.to_host, self.epoch)
            kernels.wait(stream, self.to_device, self.epoch, timeout_ns, self.timeouts)
            kernels.add(stream, self.hidden, self.reply)

    def host(self, epoch: int) -> None:
        device = self.bench.device
        wait, store = prototype("krasis_wait_flag"), prototype("krasis_store_flag")
        check(wait(self.to_host.data_ptr(), epoch, TIMEOUT_NS), "krasis_wait_flag")
        device.host_acquires(self.to_host)
        device.host_reads(self.sent)
        device.host_writes(self.reply)
        self.reply.copy_(self.sent * 10)
        device.host_releases(self.to_device)
        check(store(self.to_device.data_ptr(), epoch), "krasis_store_flag")


@pytest.mark.parametrize("is_fused", [False, True])
def test_work_goes_to_the_host_and_back(bench: Any, is_fused: bool) -> None:
    handover = Handover(bench, torch.arange(8.0))
    for epoch in (1, 2, 3):
        handover.submit(is_fused)
        bench.device.serve(lambda epoch=epoch: handover.host(epoch))
    assert bench.get(handover.hidden).tolist() == [value * 11.0**3 for value in range(8)]
    bench.device.host_reads(handover.timeouts)
    assert handover.timeouts.tolist() == [0]


def test_a_host_that_does_not_answer_in_time(bench: Any) -> None:
    handover = Handover(bench, torch.arange(8.0))
    handover.submit(is_fused=True, timeout_ns=20_000_000)
    bench.device.serve(lambda: None)
    bench.device.synchronize()
    bench.device.host_reads(handover.timeouts)
    assert handover.timeouts.tolist() == [7]
    assert bench.get(handover.hidden).tolist() == list(range(8))


def test_shapes_are_refused(bench: Any) -> None:
    kernels, stream, flag = bench.kernels, bench.stream, bench.device.flags(2)
    epoch, hidden = bench.empty(1, dtype=torch.int64), bench.empty(6)
    with pytest.raises(NativeError, match=r"signal\.flag"):
        kernels.signal(stream, flag, epoch)
    with pytest.raises(NativeError, match="multiple of 4"):
        kernels.add(stream, hidden, hidden)
    with pytest.raises(NativeError, match="too many pieces"):
        kernels.send(stream, [(hidden, hidden)] * 5, flag[:1], epoch)
    with pytest.raises(NativeError, match=r"send\.destination"):
        kernels.send(stream, [(hidden[:3], hidden)], flag[:1], epoch)
