"""The experts of a prefill on the CPU, residents on the GPU, against float64 on the dequantised weights of
each tier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from krasis.formats.architecture import Architecture
from krasis.formats.errors import NativeError
from krasis.runtime.device.double import OrderingError
from krasis.runtime.gpu.buffers import Workspace
from krasis.runtime.gpu.experts.cpu_experts import CpuExperts
from krasis.runtime.gpu.experts.stage import Step

TOKENS = 11
INT8 = 1.6e-2  # relative error that int8 activations make


def reference(weights: Any, layer: int, x: np.ndarray, ids: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """The sum of the routed experts in float64."""
    a = weights.architecture
    out = np.zeros(x.shape)
    for token, choice in np.ndindex(ids.shape):
        record = weights.layers[layer].experts[ids[token, choice]]
        parts = weights.expert_layout.unpack_expert(record, a.hidden_size, a.expert_intermediate_size)
        gate, up, down = (part.astype(np.float64) for part in parts)
        g, u = gate @ x[token], up @ x[token]
        out[token] += mix[token, choice] * (down @ (g / (1 + np.exp(-g)) * u))
    return out


class Pass:
    """One pass of random rows through every layer of a stage."""

    def __init__(self, rig: Any, shape: Architecture, num_tokens: int = TOKENS) -> None:
        self.rig, self.shape, self.stream = rig, shape, rig.model.stream
        self.random = np.random.default_rng(num_tokens)
        self.buffers = Workspace(rig.device, shape, torch.float16, num_tokens, 1).view(num_tokens)
        self.num_tokens = num_tokens
        self.inputs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.hidden = self.random.normal(size=(num_tokens, shape.hidden_size)).astype(np.float32)

    def put(self, target: torch.Tensor, values: np.ndarray) -> None:
        source = torch.from_numpy(values)

        def action(_: int) -> None:
            target.copy_(source)

        self.stream.launch("put", action, reads=(), writes=(target,))

    def run(self, stage: CpuExperts, change_ids: Callable[[np.ndarray], None] = lambda _: None) -> np.ndarray:
        a, b, count = self.shape, self.buffers, self.num_tokens
        stage.begin(self.stream, count)
        self.put(b.hidden, self.hidden)
        for layer in range(a.num_layers):
            rows = self.random.normal(size=(count, a.hidden_size)).astype(np.float16).astype(np.float32)
            order = self.random.permuted(
                np.tile(np.arange(a.num_experts, dtype=np.int32), (count, 1)), axis=1
            )
            ids = np.ascontiguousarray(order[:, : a.num_experts_per_token])
            mix = self.random.uniform(0.1, 1, ids.shape).astype(np.float32)
            self.inputs.append((rows, ids.copy(), mix))
            change_ids(ids)
            for target, values in ((b.normed, rows), (b.x, rows), (b.ids, ids), (b.weights, mix)):
                self.put(target, values)
            step = Step(b.normed, b.x, b.ids, b.weights, b.hidden, None, b, count)
            stage.run(self.stream, layer, step)
        stage.end(self.stream)
        result = self.rig.device.pinned(b.hidden.shape, torch.float32)
        self.stream.copy(result, b.hidden)
        self.stream.synchronize()
        stage.check()
        self.rig.device.host_reads(result)
        return result.numpy()

    def expected(self, weights: Any) -> np.ndarray:
        total = self.hidden.astype(np.float64)
        for layer, (rows, ids, mix) in enumerate(self.inputs):
            total += reference(weights, layer, rows, ids, mix)
        return total


def make_stage(rig: Any, shape: Architecture, residency: Any = None, max_tokens: int = 16) -> CpuExperts:
    return CpuExperts(rig.device, rig.model.kernels, rig.product, shape, rig.cpu, residency, max_tokens)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_slots", [0, 7, 18])
def test_a_pass_equals_float64(
    open_rig: Any, tiers: Any, shape: Architecture, relative_error: Any, num_slots: int, seed: int
) -> None:
    rig = open_rig(seed=seed)
    residency = None
    on_gpu: set[tuple[int, int]] = set()
    if num_slots:
        residency = rig.residency(num_slots)
        residency.fill(rig.model.stream)
        on_gpu = {(int(layer), int(e)) for layer, e in np.argwhere(residency.host_addresses != 0)}
    one = Pass(rig, shape)
    found = one.run(make_stage(rig, shape, residency))
    expected = one.expected(tiers.mixed(on_gpu))
    limit = INT8 if num_slots < 18 else 2e-3
    assert relative_error(found - one.hidden, expected - one.hidden) < limit
    # No two tiers are alike: the other choice of tiers would not pass.
    everything = {(layer, e) for layer in range(shape.num_layers) for e in range(shape.num_experts)}
    other = one.expected(tiers.mixed(everything - on_gpu))
    assert relative_error(found - one.hidden, other - one.hidden) > 3e-2


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_passes_follow_each_other(
    open_rig: Any, tiers: Any, shape: Architecture, relative_error: Any, num_tokens: int
) -> None:
    rig = open_rig(seed=2)
    residency = rig.residency(5)
    residency.fill(rig.model.stream)
    on_gpu = {(int(layer), int(e)) for layer, e in np.argwhere(residency.host_addresses != 0)}
    stage = make_stage(rig, shape, residency)
    for _ in range(2):
        one = Pass(rig, shape, num_tokens)
        found = one.run(stage)
        expected = one.expected(tiers.mixed(on_gpu))
        assert relative_error(found - one.hidden, expected - one.hidden) < INT8


def test_an_expert_left_out(open_rig: Any, shape: Architecture) -> None:
    rig = open_rig()
    one = Pass(rig, shape)

    def drop(ids: np.ndarray) -> None:
        ids[3, 1] = -1

    with pytest.raises(NativeError, match="executed exactly once"):
        one.run(make_stage(rig, shape), drop)


@pytest.mark.parametrize("seed", range(4))
def test_rows_read_too_early(
    open_rig: Any, shape: Architecture, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Without waiting for the copies the host would read what is not there yet."""
    rig = open_rig(seed=seed)
    one, stage = Pass(rig, shape), make_stage(rig, shape)
    record = type(rig.model.stream).record

    class Eager:
        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(type(rig.model.stream), "record", lambda self: Eager())
    with pytest.raises(OrderingError, match="the host reads"):
        one.run(stage)
    monkeypatch.setattr(type(rig.model.stream), "record", record)


def test_more_tokens_than_room(open_rig: Any, shape: Architecture) -> None:
    rig = open_rig()
    with pytest.raises(NativeError, match="too many tokens"):
        make_stage(rig, shape, max_tokens=4).begin(rig.model.stream, 5)
