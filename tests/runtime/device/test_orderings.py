"""What the double must catch, in any order it may choose, and what must pass with the right results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from krasis.runtime.device.double import DeviceDouble, OrderingError

HostValues = Callable[..., torch.Tensor]
SIZE = 16


def _scale(target: torch.Tensor, source: torch.Tensor, factor: float) -> None:
    target.copy_(source * factor)


def launch_scale(stream: Any, name: str, target: torch.Tensor, source: torch.Tensor, factor: float) -> None:
    stream.launch(name, lambda _: _scale(target, source, factor), reads=[source], writes=[target])


def double_buffer(
    device: DeviceDouble,
    host_values: HostValues,
    wait_for_copy: bool = True,
    wait_for_reader: bool = True,
    wait_for_result: bool = True,
) -> list[float]:
    """Six pieces through two buffers, scaled by their numbers; the sums of the results."""
    copies, compute = device.stream("copies"), device.stream("compute")
    source = host_values(device, [[float(piece)] * SIZE for piece in range(6)])
    buffers = [device.empty((SIZE,), torch.float32) for _ in range(2)]
    results, on_host = device.empty((6, SIZE), torch.float32), device.pinned((6, SIZE), torch.float32)
    last_read: list[Any] = [None, None]
    for piece in range(6):
        parity = piece % 2
        if wait_for_reader and last_read[parity] is not None:
            copies.wait(last_read[parity])
        copies.copy(buffers[parity], source[piece])
        if wait_for_copy:
            compute.wait(copies.record())
        launch_scale(compute, f"scale {piece}", results[piece], buffers[parity], piece)
        last_read[parity] = compute.record()
    compute.copy(on_host, results)
    done = compute.record()
    if wait_for_result:
        done.synchronize()
    device.host_reads(on_host)
    return on_host.sum(1).tolist()


@pytest.mark.parametrize("seed", range(40))
def test_a_double_buffer_gives_the_right_results_in_any_order(seed: int, host_values: HostValues) -> None:
    device = DeviceDouble(seed, paranoid=seed % 5 == 0)
    assert double_buffer(device, host_values) == [float(SIZE * piece * piece) for piece in range(6)]
    device.close()
    assert sum("scale" in label for label in device.executed_orders) == 6


def test_seeds_differ_in_order_and_a_seed_repeats_it(host_values: HostValues) -> None:
    def order(seed: int) -> list[str]:
        device = DeviceDouble(seed)
        double_buffer(device, host_values)
        device.close()
        return device.executed_orders

    orders = [order(seed) for seed in range(40)]
    assert len({tuple(one) for one in orders}) > 3
    assert [order(seed) for seed in range(40)] == orders


def test_a_read_before_the_copy_it_needs(device: DeviceDouble, host_values: HostValues) -> None:
    with pytest.raises(
        OrderingError, match=r"(?s)bytes \[0, 64\).*scale 0 on stream compute reads what copy on stream"
    ):
        double_buffer(device, host_values, wait_for_copy=False)


def test_a_buffer_overwritten_while_it_is_read(device: DeviceDouble, host_values: HostValues) -> None:
    expected = "copy on stream copies overwrites what scale 0 on stream compute reads"
    with pytest.raises(OrderingError, match=expected):
        double_buffer(device, host_values, wait_for_reader=False)


def test_results_read_before_the_host_waited(device: DeviceDouble, host_values: HostValues) -> None:
    with pytest.raises(OrderingError, match="the host reads what copy on stream compute wrote"):
        double_buffer(device, host_values, wait_for_result=False)


def test_an_event_recorded_too_early_orders_nothing_after_it(
    device: DeviceDouble, host_values: HostValues
) -> None:
    copies, compute = device.stream("copies"), device.stream("compute")
    source, buffer = host_values(device, [1.0] * SIZE), device.empty((SIZE,), torch.float32)
    early = copies.record()
    copies.copy(buffer, source)
    compute.wait(early)
    with pytest.raises(OrderingError, match="without being ordered after it"):
        launch_scale(compute, "scale", device.empty((SIZE,), torch.float32), buffer, 2)


def test_the_host_writes_what_is_being_copied(device: DeviceDouble, host_values: HostValues) -> None:
    stream = device.stream("copies")
    slot, buffer = host_values(device, [1.0] * SIZE), device.empty((SIZE,), torch.float32)
    stream.copy(buffer, slot)
    with pytest.raises(OrderingError, match="the host overwrites what copy on stream copies reads"):
        device.host_writes(slot)


def test_the_host_writes_other_bytes_than_those_being_copied(
    device: DeviceDouble, host_values: HostValues
) -> None:
    stream = device.stream("copies")
    ring, buffer = host_values(device, [[1.0] * SIZE] * 2), device.empty((SIZE,), torch.float32)
    stream.copy(buffer, ring[0])
    device.host_writes(ring[1])
    stream.record().synchronize()
    device.host_writes(ring[0])
    ring.zero_()
    back = device.pinned((SIZE,), torch.float32)
    stream.copy(back, buffer)
    stream.synchronize()
    device.host_reads(back)
    assert back.tolist() == [1.0] * SIZE


@pytest.mark.parametrize("hazard", ["WAR", "WAW", "RAW"])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_hazards_across_streams(
    device: DeviceDouble, host_values: HostValues, hazard: str, is_ordered: bool
) -> None:
    first, second = device.stream("first"), device.stream("second")
    a, b = (device.empty((SIZE,), torch.float32) for _ in range(2))
    for buffer in (a, b):
        first.copy(buffer, host_values(device, [1.0] * SIZE))
    first.synchronize()
    if hazard == "WAR":
        launch_scale(first, "one", b, a, 2)
    else:
        launch_scale(first, "one", a, b, 2)
    if is_ordered:
        second.wait(first.record())
    target, source = (b, a) if hazard == "RAW" else (a, device.empty((0,), torch.float32))
    reads, writes = ([source], [target]) if hazard == "RAW" else ([], [target])

    def action(_: int) -> None:
        target.fill_(7.0)

    if is_ordered:
        second.launch("two", action, reads=reads, writes=writes)
    else:
        verbs = {
            "WAR": "overwrites what one on stream first reads",
            "RAW": "reads what one on stream first wrote",
        }
        with pytest.raises(
            OrderingError, match=verbs.get(hazard, "overwrites what one on stream first wrote")
        ):
            second.launch("two", action, reads=reads, writes=writes)


def test_readers_on_several_streams_need_no_order(device: DeviceDouble, host_values: HostValues) -> None:
    streams = [device.stream(str(number)) for number in range(3)]
    shared, own = device.empty((SIZE,), torch.float32), device.empty((3, SIZE), torch.float32)
    streams[0].copy(shared, host_values(device, [3.0] * SIZE))
    ready = streams[0].record()
    for number, stream in enumerate(streams):
        stream.wait(ready)
        launch_scale(stream, "scale", own[number], shared, number)
    # A write must be ordered after all of them, not only after the last.
    streams[0].wait(streams[2].record())
    with pytest.raises(OrderingError, match="overwrites what scale on stream 1 reads"):
        streams[0].copy(shared, host_values(device, [4.0] * SIZE))


def test_order_is_passed_on(device: DeviceDouble, host_values: HostValues) -> None:
    first, second, third = (device.stream(name) for name in ("first", "second", "third"))
    a, b, c = (device.empty((SIZE,), torch.float32) for _ in range(3))
    first.copy(a, host_values(device, [1.0] * SIZE))
    second.wait(first.record())
    launch_scale(second, "two", b, a, 2)
    third.wait(second.record())
    launch_scale(third, "three", c, a, 5)  # a was written by first: known through second
    back = device.pinned((SIZE,), torch.float32)
    third.copy(back, c)
    third.synchronize()
    device.host_writes(back)


def test_memory_never_written_cannot_be_read(device: DeviceDouble) -> None:
    stream = device.stream("compute")
    half_written = device.empty((2, SIZE), torch.float32)
    stream.launch("fill", lambda _: half_written[0].zero_(), reads=[], writes=[half_written[0]])
    with pytest.raises(
        OrderingError, match=r"bytes \[64, 128\).*reads memory that was never written|never written"
    ):
        launch_scale(stream, "scale", device.empty((2, SIZE), torch.float32), half_written, 1)


def test_polling_an_event_tells_the_host_and_ends(device: DeviceDouble, host_values: HostValues) -> None:
    stream = device.stream("copies")
    slot, buffer = host_values(device, [1.0] * SIZE), device.empty((SIZE,), torch.float32)
    stream.copy(buffer, slot)
    event = stream.record()
    for _ in range(100):
        if event.is_done():
            break
    assert event.is_done()
    device.host_writes(slot)


def test_late_runs_nothing_before_the_host_waits(host_values: HostValues) -> None:
    device = DeviceDouble(policy="late")
    first, second = device.stream("first"), device.stream("second")
    a, b = (device.empty((SIZE,), torch.float32) for _ in range(2))
    first.copy(a, host_values(device, [1.0] * SIZE))
    second.copy(b, host_values(device, [1.0] * SIZE))
    assert device.executed_orders == []
    first.synchronize()
    assert device.executed_orders == ["copy on stream first"]
    device.synchronize()
    assert device.executed_orders == ["copy on stream first", "copy on stream second"]


def test_columns_beside_each_other_need_no_order(device: DeviceDouble, host_values: HostValues) -> None:
    first, second = device.stream("first"), device.stream("second")
    shared = device.empty((8, 4), torch.float32)
    first.launch("left", lambda _: shared[:, :2].fill_(1.0), reads=[], writes=[shared[:, :2]])
    second.launch("right", lambda _: shared[:, 2:].fill_(2.0), reads=[], writes=[shared[:, 2:]])
    second.launch("again", lambda _: shared[:, 2:].mul_(2.0), reads=[shared[:, 2:]], writes=[shared[:, 2:]])
    with pytest.raises(OrderingError, match=r"bytes \[40, 48\).*without being ordered"):
        first.launch("one row", lambda _: None, reads=[shared[2]], writes=[])
    device.synchronize()
    assert shared.sum(0).tolist() == [8.0, 8.0, 32.0, 32.0]
