"""The library's path of expert layers against float64, and when it is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.formats.layouts import marlin
from krasis.runtime.gpu.grouped_product import ExpertProduct
from krasis.runtime.gpu.kernels import ExpertMatrix, Routing
from krasis.runtime.gpu.many_rows import Thresholds
from krasis.runtime.gpu.many_rows_experts import (
    M_BLOCK,
    ManyRowsBuffers,
    ManyRowsExperts,
    find_grouped_product,
    most_rows,
)

NUM_EXPERTS, TOP_K, TOKENS = 5, 2, 37
HIDDEN, INTERMEDIATE, GROUP = 128, 64, 64
ALWAYS = Thresholds(None, 1)

needs_torch = pytest.mark.skipif(find_grouped_product() is None, reason="this torch has no grouped product")


def packed(seed: int, k: int, n: int) -> tuple[bytes, torch.Tensor]:
    """Codes and scales of a matrix, and the matrix itself, float64 [k, n]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (k, n), dtype=np.uint8)
    scales = torch.from_numpy(rng.uniform(0.01, 0.02, (k // GROUP, n)).astype(np.float32)).bfloat16()
    permuted = marlin.permute_scales(scales.view(torch.int16).numpy(), k, GROUP)
    centred = torch.from_numpy(codes.astype(np.float64) - 8).view(-1, GROUP, n)
    exact = (centred * scales.double()[:, None]).view(k, n)
    return marlin.pack_codes(codes, 4).tobytes() + np.ascontiguousarray(permuted).tobytes(), exact


class Layer:
    """Experts on the device, tokens routed to them, and what comes out in float64."""

    def __init__(self, bench: Any, dtype: torch.dtype, chunk: int) -> None:
        self.bench, self.dtype = bench, dtype
        made = [
            (packed(e, HIDDEN, 2 * INTERMEDIATE), packed(100 + e, INTERMEDIATE, HIDDEN))
            for e in range(NUM_EXPERTS)
        ]
        first_bytes = len(made[0][0][0])
        records = [torch.frombuffer(bytearray(a[0] + b[0]), dtype=torch.uint8) for a, b in made]
        self.memory = bench.put(torch.stack(records))
        self.table = bench.put(torch.tensor([row.data_ptr() for row in self.memory]))
        self.weights = [(a[1], b[1]) for a, b in made]
        w13, w2 = HIDDEN * 2 * INTERMEDIATE, INTERMEDIATE * HIDDEN
        self.matrices = (
            ExpertMatrix(0, w13 // 2, GROUP, HIDDEN, 2 * INTERMEDIATE, torch.bfloat16),
            ExpertMatrix(first_bytes, first_bytes + w2 // 2, GROUP, INTERMEDIATE, HIDDEN, torch.bfloat16),
        )
        generator = torch.Generator().manual_seed(4)
        # Nobody chooses the last expert but one.
        choices = [torch.randperm(NUM_EXPERTS - 1, generator=generator)[:TOP_K] for _ in range(TOKENS)]
        self.ids = torch.stack(choices).to(torch.int32)
        self.ids[self.ids == NUM_EXPERTS - 2] = NUM_EXPERTS - 1
        self.ids[3, 1] = -1
        self.routing = Routing.allocate(bench.device, TOKENS, TOP_K, NUM_EXPERTS).view(TOKENS, M_BLOCK)
        bench.kernels.align(bench.stream, bench.put(self.ids), self.routing)
        rows = most_rows(self.routing)
        self.buffers = ManyRowsBuffers(
            weights=bench.empty(2 * w13 * chunk + 7, dtype=torch.uint8),
            x=bench.empty(rows, HIDDEN, dtype=dtype),
            gated=bench.empty(rows, INTERMEDIATE, dtype=dtype),
            ends=bench.empty(NUM_EXPERTS, dtype=torch.int32),
        )
        self.x = bench.random(TOKENS, HIDDEN, dtype=dtype)

    def run(self, many: ManyRowsExperts, begin: int, end: int) -> tuple[torch.Tensor, int]:
        """The slots after experts begin..end-1, and how many were counted."""
        bench = self.bench
        slots = bench.empty(TOKENS * TOP_K, HIDDEN, dtype=self.dtype)
        executed = bench.put(torch.tensor([10]))
        many.run(
            bench.stream, bench.put(self.x), self.routing, self.table, [self.memory], self.matrices, begin,
            end, slots, executed,
        )  # fmt: skip
        return bench.get(slots).double(), int(bench.get(executed))

    def expected(self, begin: int, end: int) -> torch.Tensor:
        """[slots, HIDDEN]; NaN where the slot is of no such expert."""
        out = torch.full((TOKENS * TOP_K, HIDDEN), torch.nan, dtype=torch.float64)
        for slot, expert in enumerate(self.ids.flatten().tolist()):
            if begin <= expert < end:
                w13, w2 = self.weights[expert]
                gate, up = (self.x[slot // TOP_K].double() @ w13).chunk(2)
                out[slot] = (torch.nn.functional.silu(gate) * up) @ w2
        return out


@needs_torch
@pytest.mark.parametrize("chunk", [1, 2, NUM_EXPERTS])
def test_layer_is_right_in_any_number_of_pieces(bench: Any, chunk: int) -> None:
    layer = Layer(bench, torch.bfloat16, chunk)
    many = ManyRowsExperts(bench.kernels, layer.buffers, ALWAYS)
    for begin, end in ((0, NUM_EXPERTS), (1, 4), (3, 4)):
        found, executed = layer.run(many, begin, end)
        expected = layer.expected(begin, end)
        there = ~expected[:, 0].isnan()
        # Weights, the product of gate and up, the gated product and the result are rounded to bfloat16.
        error = (found - expected)[there]
        if there.any():
            assert error.norm() <= 2**-7 * expected[there].norm()
            assert error.norm() > 0
        assert found[~there].isnan().all()
        assert executed == 10 + int(there.sum())


@needs_torch
def test_expert_product_takes_the_path_from_its_threshold_on(bench: Any) -> None:
    layer = Layer(bench, torch.bfloat16, 2)
    w13, w2 = layer.matrices

    def part(offset: int) -> Any:
        return SimpleNamespace(offset_bytes=offset)

    architecture: Any = SimpleNamespace(
        hidden_size=HIDDEN, expert_intermediate_size=INTERMEDIATE, num_experts_per_token=TOP_K,
        num_experts=NUM_EXPERTS,
    )  # fmt: skip
    layout: Any = SimpleNamespace(scale_dtype="BF16", group_of=lambda _: GROUP)
    record: Any = SimpleNamespace(
        record_bytes=layer.memory.shape[1],
        w13_codes=part(w13.codes_offset), w13_scales=part(w13.scales_offset),
        w2_codes=part(w2.codes_offset), w2_scales=part(w2.scales_offset),
    )  # fmt: skip
    found = {}
    for least in (1, TOKENS * TOP_K // NUM_EXPERTS + 1):
        many = ManyRowsExperts(bench.kernels, layer.buffers, Thresholds(None, least))
        product = ExpertProduct(bench.kernels, architecture, layout, record, many)
        routing = Routing.allocate(bench.device, TOKENS, TOP_K, NUM_EXPERTS)
        slots = bench.empty(TOKENS * TOP_K, HIDDEN, dtype=torch.bfloat16)
        gated = bench.empty(TOKENS * TOP_K, INTERMEDIATE, dtype=torch.bfloat16)
        buffers = SimpleNamespace(routing=routing, slots=slots, gated=gated)
        step: Any = SimpleNamespace(ids=bench.put(layer.ids), x=bench.put(layer.x), buffers=buffers)
        executed = bench.put(torch.tensor([0]))
        product.align(bench.stream, step, routing.view(TOKENS))
        product.run(bench.stream, step, layer.table, [layer.memory], 0, NUM_EXPERTS, executed)
        found[least] = bench.get(slots).double()
        assert int(bench.get(executed)) == TOKENS * TOP_K - 1
    library, native = found.values()
    there = ~layer.expected(0, NUM_EXPERTS)[:, 0].isnan()
    assert 0 < (library - native)[there].norm() <= 2**-7 * native[there].norm()


@needs_torch
def test_path_is_chosen_by_mean_rows_an_expert(bench: Any) -> None:
    layer = Layer(bench, torch.bfloat16, 1)
    many = ManyRowsExperts(bench.kernels, layer.buffers, Thresholds(None, 100))
    assert many.takes(12800, 128)
    assert not many.takes(12799, 128)
    assert not ManyRowsExperts(bench.kernels, None, ALWAYS).takes(12800, 128)
    assert not ManyRowsExperts(bench.kernels, layer.buffers, Thresholds(1, None)).takes(12800, 128)


@needs_torch
def test_what_does_not_fit_is_refused(bench: Any) -> None:
    layer = Layer(bench, torch.bfloat16, 1)
    b = layer.buffers
    for wrong in (
        ManyRowsBuffers(b.weights[:1000], b.x, b.gated, b.ends),
        ManyRowsBuffers(b.weights, b.x[:40], b.gated, b.ends),
        None,
    ):
        with pytest.raises(NativeError, match="many rows"):
            layer.run(ManyRowsExperts(bench.kernels, wrong, ALWAYS), 0, NUM_EXPERTS)


def test_without_a_grouped_product_the_path_is_never_taken(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    assert find_grouped_product() is None
    layer = Layer(bench, torch.bfloat16, 1)
    assert not ManyRowsExperts(bench.kernels, layer.buffers, ALWAYS).takes(12800, 128)
