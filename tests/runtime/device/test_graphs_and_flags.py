"""Graphs replayed with the same checks; flags by which host and device hand work to and fro."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from krasis.formats.errors import UsageError
from krasis.runtime.device.double import DeviceDouble, OrderingError
from tests.support.patience import PATIENCE_S

HostValues = Callable[..., torch.Tensor]


def add(target: torch.Tensor, source: torch.Tensor) -> Callable[[int], None]:
    def action(_: int) -> None:
        target.add_(source)

    return action


def test_a_graph_runs_when_replayed_and_again(device: DeviceDouble, host_values: HostValues) -> None:
    stream = device.stream("compute")
    source, total = host_values(device, [1.0, 2.0]), device.empty((2,), torch.float32)
    step, back = device.empty((2,), torch.float32), device.pinned((2,), torch.float32)
    stream.copy(total, source)
    with device.capture(stream) as graph:
        stream.copy(step, source)
        stream.launch("add", add(total, step), reads=[total, step], writes=[total])
    for _ in range(3):
        graph.replay(stream)
    stream.copy(back, total)
    stream.synchronize()
    device.host_reads(back)
    assert back.tolist() == [4.0, 8.0]


def test_a_replayed_graph_is_checked(device: DeviceDouble, host_values: HostValues) -> None:
    compute, copies = device.stream("compute"), device.stream("copies")
    source, total = host_values(device, [1.0, 2.0]), device.empty((2,), torch.float32)
    step = device.empty((2,), torch.float32)
    with device.capture(compute) as graph:
        compute.launch("add", add(total, step), reads=[total, step], writes=[total])
    compute.copy(total, source)
    copies.copy(step, source)
    with pytest.raises(OrderingError, match="add on stream compute reads what copy on stream copies wrote"):
        graph.replay(compute)


def test_a_captured_stream_has_no_events(device: DeviceDouble) -> None:
    stream, other = device.stream("compute"), device.stream("other")
    with device.capture(stream):
        with pytest.raises(UsageError, match="events"):
            stream.record()
        with pytest.raises(UsageError, match="events"):
            stream.wait(other.record())
        with pytest.raises(UsageError, match="already"), device.capture(stream):
            pass


class Handover:
    """total += reply, where the host replies with twice what it was sent; flags as the kernels set them."""

    def __init__(self, device: DeviceDouble, hidden: torch.Tensor) -> None:
        self.device, self.hidden = device, hidden
        self.sent, self.reply = (device.pinned(hidden.shape, torch.float32) for _ in range(2))
        self.flags = device.flags(2)
        self.to_host, self.to_device = self.flags[0:1], self.flags[1:2]
        self.epoch = device.empty((1,), torch.int64)

    def submit(self, stream: Any, acquires: bool = True) -> None:
        def advance(_: int) -> None:
            self.epoch.add_(1)

        def send(_: int) -> None:
            self.sent.copy_(self.hidden)
            self.to_host.copy_(self.epoch)

        def receive(_: int) -> None:
            deadline = time.monotonic() + PATIENCE_S
            while int(self.to_device) < int(self.epoch):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.0005)
            self.hidden.add_(self.reply)

        stream.launch("advance", advance, reads=[self.epoch], writes=[self.epoch])
        stream.launch("send", send, reads=[self.hidden, self.epoch], writes=[self.sent, self.to_host])
        flags = [self.to_device] if acquires else []
        reads = [self.reply, self.hidden, self.epoch, *flags]
        stream.launch("receive", receive, reads=reads, writes=[self.hidden])

    def serve(self, epoch: int, acquires: bool = True, releases: bool = True) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while int(self.to_host) < epoch:
            if time.monotonic() > deadline:
                raise TimeoutError("the device sent nothing")
            time.sleep(0.0005)
        if acquires:
            self.device.host_acquires(self.to_host)
        self.device.host_reads(self.sent)
        self.device.host_writes(self.reply)
        self.reply.copy_(self.sent * 2)
        if releases:
            self.device.host_releases(self.to_device)
        self.to_device.fill_(epoch)


def start(device: DeviceDouble, host_values: HostValues) -> tuple[Any, Handover]:
    stream, hidden = device.stream("compute"), device.empty((2,), torch.float32)
    stream.copy(hidden, host_values(device, [1.0, 2.0]))
    handover = Handover(device, hidden)
    stream.launch("zero", lambda _: handover.epoch.zero_(), reads=[], writes=[handover.epoch])
    return stream, handover


@pytest.mark.parametrize("is_captured", [False, True])
def test_work_goes_to_and_fro(device: DeviceDouble, host_values: HostValues, is_captured: bool) -> None:
    stream, handover = start(device, host_values)
    if is_captured:
        with device.capture(stream) as graph:
            handover.submit(stream)
            handover.submit(stream)
    for step in range(2):
        if is_captured:
            graph.replay(stream)
        else:
            handover.submit(stream)
            handover.submit(stream)

        def host(first: int = 2 * step + 1) -> None:
            handover.serve(first)
            handover.serve(first + 1)

        device.serve(host)
    back = device.pinned((2,), torch.float32)
    stream.copy(back, handover.hidden)
    stream.synchronize()
    device.host_reads(back)
    assert back.tolist() == [81.0, 162.0]


def test_a_host_that_does_not_acquire_reads_too_early(device: DeviceDouble, host_values: HostValues) -> None:
    stream, handover = start(device, host_values)
    handover.submit(stream)

    def host() -> None:
        try:
            handover.serve(1, acquires=False)
        finally:
            handover.to_device.fill_(1)

    with pytest.raises(OrderingError, match="the host reads what send on stream compute wrote"):
        device.serve(host)


def test_a_host_that_writes_after_it_released(device: DeviceDouble, host_values: HostValues) -> None:
    stream, handover = start(device, host_values)
    handover.submit(stream)

    def host() -> None:
        device.host_releases(handover.to_device)
        handover.serve(1, releases=False)

    with pytest.raises(OrderingError, match="receive on stream compute reads"):
        device.serve(host)


def test_a_launch_that_does_not_wait_reads_too_early(host_values: HostValues) -> None:
    device = DeviceDouble(policy="late")
    stream, handover = start(device, host_values)
    device.host_writes(handover.reply)
    handover.submit(stream, acquires=False)

    def host() -> None:
        try:
            handover.serve(1)
        finally:
            handover.to_device.fill_(1)

    with pytest.raises(OrderingError, match="the host overwrites what receive on stream compute reads"):
        device.serve(host)


def test_errors_of_the_host_come_out(device: DeviceDouble) -> None:
    def host() -> None:
        raise ValueError("from the host")

    with pytest.raises(ValueError, match="from the host"):
        device.serve(host)
    device.serve(lambda: None)


def test_streams_may_be_used_by_several_threads(device: DeviceDouble, host_values: HostValues) -> None:
    """A reader thread refills two slots of a ring once their copies are done; another submits copies."""
    stream, other = device.stream("copies"), device.stream("compute")
    ring, buffer = host_values(device, [[0.0] * 4] * 2), device.empty((20, 4), torch.float32)
    filled, free = [threading.Semaphore(0) for _ in range(2)], [threading.Semaphore(1) for _ in range(2)]
    events: list[Any] = [None, None]

    def fill() -> None:
        for piece in range(20):
            slot = piece % 2
            free[slot].acquire(timeout=PATIENCE_S)
            if events[slot] is not None:
                events[slot].synchronize()
            device.host_writes(ring[slot])
            ring[slot].fill_(float(piece))
            filled[slot].release()

    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(fill)
        for piece in range(20):
            slot, own = piece % 2, buffer[piece]
            filled[slot].acquire(timeout=PATIENCE_S)
            stream.copy(own, ring[slot])
            events[slot] = stream.record()
            free[slot].release()
            other.wait(events[slot])
            other.launch("double", add(own, own), reads=[own], writes=[own])
        reader.result()
    device.synchronize()
    assert buffer[:, 0].tolist() == [2.0 * piece for piece in range(20)]
