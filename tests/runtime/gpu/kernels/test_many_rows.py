"""The library's path of dense products against float64, and when it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.gpu.kernels.many_rows import ManyRows, multiply, weight_pieces

TILE_ROWS = 32
ALWAYS = 1


def int8_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [n/32, k/4, 32, 4], scales [n], and the weight as float64 [n, k]."""
    generator = torch.Generator().manual_seed(n + k)
    rows = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    scales = 0.001 + 0.01 * torch.rand(n, generator=generator)
    codes = rows.view(n // TILE_ROWS, TILE_ROWS, k // 4, 4).transpose(1, 2).contiguous()
    return codes, scales, rows.double() * scales.double()[:, None]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_product_is_right_in_any_number_of_pieces(
    bench: Any, out_dtype: torch.dtype, with_residual: bool
) -> None:
    tokens, n, k = 5, 224, 128
    codes, scales, exact = int8_weight(n, k)
    x = bench.random(tokens, k, dtype=torch.bfloat16)
    residual = bench.random(tokens, n, seed=2).to(out_dtype) if with_residual else None
    scratch = bench.empty(4 * TILE_ROWS * k * 2 + 4, dtype=torch.uint8)
    many = ManyRows(bench.kernels, scratch, ALWAYS)
    out = bench.put(residual) if residual is not None else bench.empty(tokens, n, dtype=out_dtype)
    many.dense_product(
        bench.stream, bench.put(x), bench.put(codes), bench.put(scales), out, out if with_residual else None
    )
    expected = x.double() @ exact.T
    size = x.double().abs() @ exact.abs().T
    if residual is not None:
        expected += residual.double()
    # A weight is rounded once to bfloat16; so is the result, unless it stays float32.
    bound = 2**-8.9 * size + (2**-8.9 if out_dtype == torch.bfloat16 else 1e-6) * expected.abs()
    error = (bench.get(out).double() - expected).abs()
    assert (error <= bound).all()
    assert error.max() > 0


def test_few_rows_keep_to_the_native_kernel(bench: Any) -> None:
    codes, scales, _ = int8_weight(64, 64)
    x = bench.put(bench.random(9, 64, dtype=torch.float16))
    placed = bench.put(codes), bench.put(scales)
    scratch = bench.empty(64 * 64 * 2, dtype=torch.uint8)
    native = bench.empty(9, 64)
    bench.kernels.int8_gemm(bench.stream, x, *placed, native)
    for many in (
        ManyRows(bench.kernels, scratch, 10),
        ManyRows(bench.kernels, None, ALWAYS),
        ManyRows(bench.kernels, scratch),  # as measured: thousands of tokens, on the double never
    ):
        assert not many.takes(9)
        out = bench.empty(9, 64)
        many.dense_product(bench.stream, x, *placed, out)
        assert torch.equal(bench.get(out), bench.get(native))
    assert ManyRows(bench.kernels, scratch, 9).takes(9)


@pytest.mark.parametrize(("n", "fits", "pieces"), [(96, 96, 1), (96, 64, 2), (4096, 1000, 5), (32, 32, 1)])
def test_pieces_are_even_whole_tiles_that_fit(n: int, fits: int, pieces: int) -> None:
    k = 64
    cuts = weight_pieces(n, k, 2 * k * fits + 5)
    assert [begin for begin, _ in cuts] == [0, *(end for _, end in cuts[:-1])]
    assert cuts[-1][1] == n
    assert len(cuts) == pieces
    sizes = [end - begin for begin, end in cuts]
    assert max(sizes) <= fits
    assert max(sizes) - min(sizes) <= TILE_ROWS
    assert all(size % TILE_ROWS == 0 for size in sizes)


def test_scratch_without_room_for_a_tile_is_refused() -> None:
    with pytest.raises(NativeError, match="scratch"):
        weight_pieces(64, 128, 2 * 128 * TILE_ROWS - 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's CUDA products")
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_librarys_sums_stay_fp32(out_dtype: torch.dtype, with_residual: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3000, 512, generator=generator).bfloat16().cuda()
    weight = torch.randn(384, 512, generator=generator).bfloat16().cuda()
    out = torch.randn(3000, 384, generator=generator).to(out_dtype).cuda()
    expected = x.double() @ weight.double().T + (out.double() if with_residual else 0)
    sums = torch.empty(700 * 384, device="cuda")  # five pieces
    multiply(x, weight, out, out if with_residual else None, sums)
    rounding = 2**-8 if out_dtype == torch.bfloat16 else 1e-6  # half a unit of bf16's 8 significant bits
    size = x.double().abs() @ weight.double().abs().T
    assert ((out.double() - expected).abs() <= 2e-6 * size + rounding * expected.abs()).all()
