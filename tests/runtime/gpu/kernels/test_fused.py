"""Wrappers of launches that do the work of several, against torch in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.mlps import Router
from krasis.runtime.gpu.kernels.fused import Choice, fits_norm_route
from krasis.runtime.gpu.kernels.gpu_kernels import Routing
from krasis.runtime.gpu.kernels.named_slots import fits_named

BF16, F32 = torch.bfloat16, torch.float32
SIZE, EXPERTS, TOP_K, EPS = 128, 12, 3, 1e-6


def tiled(weight: torch.Tensor) -> torch.Tensor:
    """int8 [n, k] as [n/32, k/4, 32, 4]."""
    n, k = weight.shape
    return weight.view(n // 32, 32, k // 4, 4).permute(0, 2, 1, 3).contiguous()


def normed(hidden: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    scale = (hidden.double().square().mean(1, keepdim=True) + EPS).rsqrt()
    return hidden.double() * scale * norm.double()


def test_norm_product(bench: Any) -> None:
    hidden, norm = bench.random(1, SIZE), bench.random(SIZE, dtype=BF16, seed=2)
    codes = torch.randint(-128, 128, (64, SIZE), dtype=torch.int8)
    scales, out = torch.full((64,), 0.01), bench.empty(1, 64)
    arguments = (bench.put(tiled(codes)), bench.put(scales))
    bench.kernels.norm_product(bench.stream, bench.put(hidden), bench.put(norm), EPS, *arguments, out, BF16)
    x = normed(hidden, norm).to(BF16).double()
    torch.testing.assert_close(bench.get(out).double(), x @ codes.double().T * 0.01, rtol=2e-3, atol=2e-2)
    with pytest.raises(NativeError, match="sizes do not fit"):
        bench.kernels.norm_product(
            bench.stream,
            bench.put(hidden[:, :96].contiguous()),
            bench.put(norm[:96]),
            EPS,
            *arguments,
            out,
            BF16,
        )


def test_norm_route(bench: Any) -> None:
    hidden, norm = bench.random(1, SIZE), bench.random(SIZE, dtype=BF16, seed=2)
    weight = bench.random(EXPERTS, SIZE, dtype=BF16, seed=3)
    router = Router(top_k=TOP_K)
    x, row = bench.empty(1, SIZE, dtype=BF16), bench.empty(1, SIZE)
    arrivals = bench.put(torch.zeros(1, dtype=torch.int32))
    choice = Choice(
        bench.empty(1, EXPERTS), bench.empty(1, TOP_K, dtype=torch.int32), bench.empty(1, TOP_K), arrivals
    )
    placed = [bench.put(tensor) for tensor in (hidden, norm, weight)]
    for _ in range(2):  # the counter is left as zero
        bench.kernels.norm_route(bench.stream, *placed[:2], EPS, placed[2], router, choice, x, row)
        expected = normed(hidden, norm)
        logits = expected @ weight.double().T
        best = logits.softmax(1).topk(TOP_K)
        assert bench.get(choice.ids).tolist() == best.indices.tolist()
        torch.testing.assert_close(bench.get(choice.logits).double(), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bench.get(row).double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(bench.get(x), bench.get(row).to(BF16))
    assert bench.get(arrivals).item() == 0
    assert not fits_norm_route(replace(router, groups=4, top_groups=2), SIZE, EXPERTS)
    assert not fits_norm_route(router, 12288, EXPERTS)


def test_which_slots_may_be_named(bench: Any) -> None:
    routing = Routing.allocate(bench.device, 4, 40, 128)
    assert fits_named(routing.view(1, 16))
    assert not fits_named(routing.view(2, 16))
    assert not fits_named(routing.view(1, 32))
