"""Mistakes put into hybrid decode on purpose: each must be an error that says where, never wrong logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from krasis.formats.errors import NativeError, UsageError
from krasis.runtime.cpu.program import Call, Program
from krasis.runtime.device.api import Stream
from krasis.runtime.device.double import OrderingError
from krasis.runtime.gpu.experts.handover import Handover
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels

SHORT_S = 2.0  # each is waited for to its end; nothing else may come so late


def mutate(rig: Any, kernels: type[GpuKernels]) -> None:
    rig.model = replace(rig.model, kernels=kernels(rig.device))


class Nth:
    """Whether a call is the one of a layer: the first layer runs once more, before the capture."""

    def __init__(self, layer: int) -> None:
        self.left = layer + 1

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == -1


def test_a_signal_that_is_not_sent(open_rig: Any) -> None:
    is_mine = Nth(1)

    class NoSignal(GpuKernels):
        def send(self, stream: Stream, pieces: Any, flag: Any, epoch: Any) -> None:
            if is_mine():
                for destination, source in pieces:
                    stream.copy(destination, source)
            else:
                super().send(stream, pieces, flag, epoch)

    rig = open_rig()
    mutate(rig, NoSignal)
    decoder = rig.decoder(timeout_s=SHORT_S)
    with pytest.raises(NativeError, match="did not come in time") as raised:
        decoder.decode(1, 0)
    assert raised.value.where == "layer 1: the CPU waits for the GPU"


@pytest.mark.parametrize("layer", [0, 2])
def test_an_answer_that_is_not_given(
    open_rig: Any, monkeypatch: pytest.MonkeyPatch, layer: int, tokens: list[int]
) -> None:
    """And the decoder works again once the CPU does."""
    rig = open_rig()
    decoder = rig.decoder(timeout_s=SHORT_S)
    good = decoder.decode(tokens[0], 0).copy()
    host, store = decoder._host, decoder._host._store
    silent = host._layers[layer].done_address
    monkeypatch.setattr(host, "_store", lambda flag, value: 0 if flag == silent else store(flag, value))
    released, mine = rig.device.host_releases, host._layers[layer].done
    monkeypatch.setattr(rig.device, "host_releases", lambda flag: None if flag is mine else released(flag))
    with pytest.raises(NativeError, match="GPU waited in vain") as raised:
        decoder.decode(tokens[0], 0)
    assert raised.value.where == f"layer {layer}"
    monkeypatch.undo()
    assert (decoder.decode(tokens[0], 0) == good).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_cpu_that_fails(
    open_rig: Any, monkeypatch: pytest.MonkeyPatch, tokens: list[int], seed: int
) -> None:
    """In the middle layer: its error comes through at once, and the next token is as if nothing was."""
    rig = open_rig(seed=seed)
    decoder = rig.decoder()
    good = decoder.decode(tokens[0], 0).copy()
    first, real, last = decoder._host._layers

    def fail(*_: Any) -> int:
        return 8

    bad = replace(real, program=Program("layer 1"))
    bad.program.add(real.program.calls[0])
    bad.program.add(replace(real.program.calls[1], function=fail))
    monkeypatch.setattr(decoder._host, "_layers", [first, bad, last])
    with pytest.raises(NativeError, match="out of range") as raised:
        decoder.decode(tokens[0], 0)
    assert raised.value.where == "layer 1: krasis_moe"
    monkeypatch.undo()
    assert (decoder.decode(tokens[0], 0) == good).all()


@pytest.mark.parametrize("seed", range(4))
def test_ctrl_c(open_rig: Any, monkeypatch: pytest.MonkeyPatch, tokens: list[int], seed: int) -> None:
    """In the middle of a layer, and between the replay and the host's loop: the next token is as it should
    be."""
    rig = open_rig(seed=seed)
    decoder = rig.decoder()
    good = [decoder.decode(tokens[0], 0).copy(), decoder.decode(tokens[1], 1).copy()]

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    first, real, last = decoder._host._layers
    bad = replace(real, program=Program())
    bad.program.add(Call(interrupt, (), ""))
    monkeypatch.setattr(decoder._host, "_layers", [first, bad, last])
    with pytest.raises(KeyboardInterrupt):
        decoder.decode(tokens[1], 1)
    monkeypatch.undo()
    assert (decoder.decode(tokens[1], 1) == good[1]).all()
    monkeypatch.setattr(rig.device, "serve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoder.decode(tokens[0], 0)
    monkeypatch.undo()
    assert (decoder.decode(tokens[0], 0) == good[0]).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_result_that_is_read_too_early(open_rig: Any, seed: int) -> None:
    is_mine = Nth(1)

    class NoWait(GpuKernels):
        def receive(self, stream: Stream, hidden: Any, x: Any, *rest: Any, **more: Any) -> None:
            if is_mine():
                self.add(stream, hidden, x)
            else:
                super().receive(stream, hidden, x, *rest, **more)

    rig = open_rig(seed=seed)
    mutate(rig, NoWait)
    with pytest.raises(OrderingError):
        rig.decoder().decode(1, 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_signal_before_the_values(open_rig: Any, seed: int) -> None:
    is_mine = Nth(1)

    class EarlySignal(GpuKernels):
        def send(self, stream: Stream, pieces: Any, flag: Any, epoch: Any) -> None:
            if is_mine():
                self.signal(stream, flag, epoch)
                for destination, source in pieces:
                    stream.copy(destination, source)
            else:
                super().send(stream, pieces, flag, epoch)

    rig = open_rig(seed=seed)
    mutate(rig, EarlySignal)
    with pytest.raises(OrderingError):
        rig.decoder().decode(1, 0)


def test_one_result_buffer_would_not_do(open_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host clears the next layer's result while the device may still read the last one's."""
    monkeypatch.setattr("krasis.runtime.gpu.experts.handover.NUM_RESULTS", 1)
    monkeypatch.setattr("krasis.runtime.gpu.experts.host_experts.NUM_RESULTS", 1)
    with pytest.raises(OrderingError):
        open_rig().decoder().decode(1, 0)


class BothSides(GpuKernels):
    """The CPU gets the residents' ids too: what both compute is counted twice."""

    def norm_route(self, stream: Stream, *arguments: Any, **more: Any) -> None:
        super().norm_route(stream, *arguments, **more)
        choice = arguments[5]
        stream.copy(choice.cpu_ids, choice.ids)


class NeitherSide(GpuKernels):
    """The GPU is not told of its residents."""

    def norm_route(self, stream: Stream, *arguments: Any, **more: Any) -> None:
        super().norm_route(stream, *arguments, **more)
        gpu_ids = arguments[5].gpu_ids

        def forget(_: int) -> None:
            gpu_ids.fill_(-1)

        stream.launch("forget", forget, reads=(), writes=(gpu_ids,))


@pytest.mark.parametrize("kernels", [BothSides, NeitherSide])
def test_an_expert_run_twice_or_never(open_rig: Any, kernels: type[GpuKernels]) -> None:
    rig = open_rig()
    mutate(rig, kernels)
    residency = rig.residency(17)
    residency.fill(rig.model.stream)
    decoder = rig.decoder(residency)

    def decode_some() -> None:
        for position in range(3):
            decoder.decode(position, position)

    with pytest.raises(NativeError, match="executed exactly once"):
        decode_some()


def test_without_cpu_experts(open_rig: Any, tokens: list[int]) -> None:
    rig = open_rig()
    with pytest.raises(UsageError, match="CPU experts"):
        rig.decoder(cpu=None)
    residency = rig.residency(18)
    with pytest.raises(UsageError, match="CPU experts"):
        rig.decoder(residency, cpu=None)
    residency.fill(rig.model.stream)
    decoder = rig.decoder(residency, cpu=None)
    assert np.isfinite(decoder.decode(tokens[0], 0)).all()
    assert not any("send" in name or "receive" in name for name in rig.device.executed_orders)


def test_positions(open_rig: Any) -> None:
    decoder = open_rig().decoder()
    for position in (-1, 24):
        with pytest.raises(NativeError, match="position"):
            decoder.decode(1, position)


def test_flags_keep_apart(open_rig: Any, shape: Any) -> None:
    """No two flags share a line of a cache, and none is a word of another's."""
    rig = open_rig()
    handover = Handover(rig.device, rig.model.kernels, shape, 1.0)
    flags = [
        f(layer) for f in (handover.host_flag, handover.device_flag) for layer in range(shape.num_layers)
    ]
    addresses = sorted(flag.data_ptr() for flag in flags)
    assert min(np.diff(addresses)) >= 128
    assert all(flag.shape == (1,) and flag.dtype == torch.int64 for flag in flags)
