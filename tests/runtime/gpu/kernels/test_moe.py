"""Wrappers of expert kernels against torch in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.formats.layouts import marlin
from krasis.formats.models.mlps import Router
from krasis.runtime.gpu.kernels.gpu_kernels import ExpertMatrix, Routing
from krasis.runtime.gpu.kernels.router_arguments import NO_VECTORS

BF16, F16 = torch.bfloat16, torch.float16
NUM_EXPERTS, TOP_K, TOKENS = 5, 2, 21
HIDDEN, INTERMEDIATE, GROUP = 128, 64, 32


def routed(tokens: int = TOKENS) -> torch.Tensor:
    """ids int32 [tokens, TOP_K] with some of no expert."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    ids[2, 1] = ids[7, 0] = -1
    return ids.to(torch.int32)


def expert_matrices(k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, ExpertMatrix]:
    """Records uint8 [experts, bytes], the weights float64 [experts, k, n] they hold, and where."""
    rng = np.random.default_rng(9)
    records, weights = [], []
    for _ in range(NUM_EXPERTS):
        codes = rng.integers(0, 16, (k, n), dtype=np.uint8)
        scales = torch.from_numpy(rng.uniform(0.01, 0.02, (k // GROUP, n)).astype(np.float32)).to(dtype)
        packed = marlin.permute_scales(scales.view(torch.int16).numpy(), k, GROUP)
        record = marlin.pack_codes(codes, 4).tobytes() + np.ascontiguousarray(packed).tobytes()
        records.append(torch.frombuffer(bytearray(record), dtype=torch.uint8))
        centred = torch.from_numpy(codes.astype(np.float64) - 8).view(-1, GROUP, n)
        weights.append((centred * scales.double()[:, None]).view(k, n))
    matrix = ExpertMatrix(0, k * n // 2, GROUP, k, n, dtype)
    return torch.stack(records), torch.stack(weights), matrix


class Layer:
    """Experts on the device, and a routing of tokens to them."""

    def __init__(
        self, bench: Any, k: int, n: int, dtype: torch.dtype = BF16, absent: tuple[int, ...] = ()
    ) -> None:
        records, self.weights, self.matrix = expert_matrices(k, n, dtype)
        self.memory = bench.put(records)
        addresses = [0 if e in absent else self.memory[e].data_ptr() for e in range(NUM_EXPERTS)]
        self.table = bench.put(torch.tensor(addresses))
        self.ids = routed()
        self.routing = Routing.allocate(bench.device, 2 * TOKENS, TOP_K, NUM_EXPERTS).view(TOKENS, 16)
        bench.kernels.align(bench.stream, bench.put(self.ids), self.routing)

    def product(self, x: torch.Tensor, slots_per_row: int) -> torch.Tensor:
        """[slots, n] in float64; rows of no expert are NaN."""
        flat = self.ids.flatten().tolist()
        nothing = torch.full((self.matrix.n,), torch.nan, dtype=torch.float64)
        rows = x.double()
        return torch.stack(
            [nothing if e < 0 else rows[s // slots_per_row] @ self.weights[e] for s, e in enumerate(flat)]
        )


def rows_of(ids: torch.Tensor, experts: range) -> torch.Tensor:
    return torch.isin(ids.flatten(), torch.tensor(list(experts)))


@pytest.mark.parametrize("m_block", [None, 16, 32, 64, 128])
def test_align_sorts_slots_by_expert(bench: Any, m_block: int | None) -> None:
    ids = routed()
    ids[3, 0] = 99
    routing = Routing.allocate(bench.device, 2 * TOKENS, TOP_K, NUM_EXPERTS).view(TOKENS, m_block)
    bench.kernels.align(bench.stream, bench.put(ids), routing)
    first, slots = bench.get(routing.first_block).tolist(), bench.get(routing.sorted_slots).tolist()
    flat, block = ids.flatten().tolist(), routing.m_block
    assert m_block in (None, block)
    assert bench.get(routing.num_invalid).tolist() == [1]
    assert bench.get(routing.counts).tolist() == [flat.count(e) for e in range(NUM_EXPERTS)]
    for expert in range(NUM_EXPERTS):
        own = slots[first[expert] * block : first[expert + 1] * block]
        expected = [slot for slot, e in enumerate(flat) if e == expert]
        assert own == expected + [-1] * (-len(expected) % block)
        assert bench.get(routing.block_experts)[first[expert] : first[expert + 1]].unique().tolist() == [
            expert
        ]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("out_dtype", [torch.float32, None])
def test_moe_gemm(bench: Any, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    layer, x = Layer(bench, INTERMEDIATE, HIDDEN, dtype), bench.random(TOKENS, INTERMEDIATE, dtype=dtype)
    out = bench.empty(TOKENS * TOP_K, HIDDEN, dtype=out_dtype or dtype)
    executed, placed = bench.put(torch.tensor([100])), bench.put(x)
    for begin, end in ((0, 2), (2, NUM_EXPERTS)):
        bench.kernels.moe_gemm(
            bench.stream, placed, layer.routing, layer.table, [layer.memory], layer.matrix, begin, end, out,
            gated=False, slots_per_row=TOP_K, executed=executed,
        )  # fmt: skip
    expected, found = layer.product(x, TOP_K), bench.get(out).double()
    limit = 1e-4 if out_dtype else 2**-8
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit, equal_nan=True)
    assert bench.get(executed).tolist() == [100 + TOKENS * TOP_K - 2]


def test_moe_gemm_gated_of_some_experts(bench: Any) -> None:
    layer, x = Layer(bench, HIDDEN, 2 * INTERMEDIATE, absent=(1,)), bench.random(TOKENS, HIDDEN, dtype=BF16)
    out = bench.empty(TOKENS * TOP_K, INTERMEDIATE, dtype=torch.float32)
    bench.kernels.moe_gemm(
        bench.stream, bench.put(x), layer.routing, layer.table, [layer.memory], layer.matrix, 0, 3, out,
        gated=True, slots_per_row=TOP_K,
    )  # fmt: skip
    gate, up = layer.product(x, TOP_K).chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    is_there = rows_of(layer.ids, range(3)) & (layer.ids.flatten() != 1)
    expected[~is_there] = torch.nan
    torch.testing.assert_close(bench.get(out).double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_moe_reduce(bench: Any) -> None:
    ids, slots = routed(), bench.random(TOKENS * TOP_K, 64, dtype=BF16)
    weights, hidden = torch.rand(TOKENS, TOP_K), bench.random(TOKENS, 64, seed=4)
    out = bench.put(hidden)
    bench.kernels.moe_reduce(
        bench.stream, bench.put(slots), bench.put(ids), bench.put(weights), out, out, NUM_EXPERTS
    )
    scaled = slots.double().view(TOKENS, TOP_K, 64) * torch.where(ids < 0, 0.0, weights.double())[..., None]
    torch.testing.assert_close(bench.get(out).double(), hidden.double() + scaled.sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_router(bench: Any, dtype: torch.dtype) -> None:
    x, weight = bench.random(3, 128), bench.random(NUM_EXPERTS, 128, dtype=dtype, seed=2)
    out = bench.empty(3, NUM_EXPERTS)
    bench.kernels.router(bench.stream, bench.put(x), bench.put(weight), out)
    torch.testing.assert_close(bench.get(out).double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_route(bench: Any, normalize: bool) -> None:
    logits = bench.random(9, 16)
    ids, gpu_ids, cpu_ids = (bench.empty(9, 4, dtype=torch.int32) for _ in range(3))
    weights, resident = bench.empty(9, 4), torch.arange(16) % 3 == 0
    counts = bench.put(torch.arange(16))
    bench.kernels.route(
        bench.stream, bench.put(logits), Router(4, renormalise=normalize), ids, weights,
        NO_VECTORS, bench.put(resident.to(torch.uint8)), gpu_ids, cpu_ids, counts,
    )  # fmt: skip
    shares, expected = logits.double().softmax(1).topk(4)
    if normalize:
        shares = shares / shares.sum(1, keepdim=True)
    assert torch.equal(bench.get(ids).long(), expected)
    torch.testing.assert_close(bench.get(weights).double(), shares, rtol=1e-5, atol=1e-7)
    on_gpu, none = resident[expected], torch.tensor(-1)
    assert torch.equal(bench.get(gpu_ids).long(), torch.where(on_gpu, expected, none))
    assert torch.equal(bench.get(cpu_ids).long(), torch.where(on_gpu, none, expected))
    assert torch.equal(bench.get(counts), torch.arange(16) + expected.flatten().bincount(minlength=16))


def test_shapes_and_ranges_are_refused(bench: Any) -> None:
    layer, x = Layer(bench, INTERMEDIATE, HIDDEN), bench.empty(TOKENS, INTERMEDIATE, dtype=BF16)
    out = bench.empty(TOKENS * TOP_K, HIDDEN, dtype=BF16)

    def gemm(x: torch.Tensor, begin: int, end: int, out: torch.Tensor, slots_per_row: int = TOP_K) -> None:
        bench.kernels.moe_gemm(
            bench.stream, x, layer.routing, layer.table, [layer.memory], layer.matrix, begin, end, out,
            gated=False, slots_per_row=slots_per_row,
        )  # fmt: skip

    with pytest.raises(NativeError, match="experts out of range"):
        gemm(x, 0, NUM_EXPERTS + 1, out)
    with pytest.raises(NativeError, match=r"moe_gemm\.x"):
        gemm(x, 0, 1, out, slots_per_row=1)
    with pytest.raises(NativeError, match="slots_per_row"):
        gemm(x, 0, 1, out, slots_per_row=3)
    with pytest.raises(NativeError, match=r"moe_gemm\.out"):
        gemm(x, 0, 1, out[:-1])
    with pytest.raises(NativeError, match=r"moe_gemm\.x"):
        gemm(x.float(), 0, 1, out)
    with pytest.raises(NativeError, match=r"align\.ids"):
        bench.kernels.align(bench.stream, bench.empty(TOKENS, TOP_K, dtype=torch.int64), layer.routing)
    with pytest.raises(NativeError, match="more tokens"):
        layer.routing.view(TOKENS + 1)
    with pytest.raises(NativeError, match="no such block"):
        layer.routing.view(TOKENS, 24)
    with pytest.raises(NativeError, match="too many tokens"):
        bench.kernels.router(bench.stream, bench.empty(9, 64), bench.empty(4, 64), bench.empty(9, 4))
    ids, weights = bench.empty(2, 4, dtype=torch.int32), bench.empty(2, 3)
    with pytest.raises(NativeError, match=r"route\.weights"):
        bench.kernels.route(bench.stream, bench.empty(2, 16), Router(4), ids, weights)
