"""Wrappers of dense kernels against torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from krasis.formats.errors import NativeError

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Half a unit in the last place of the output, and a little for sums in float32.
ROUNDING = {BF16: 2**-8, F16: 2**-10, F32: 5e-5}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    limit = ROUNDING[found.dtype]
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=limit, atol=limit * expected.std().item()
    )


def tiled(weight: torch.Tensor) -> torch.Tensor:
    """int8 [n, k] as [n/32, k/4, 32, 4]."""
    n, k = weight.shape
    return weight.view(n // 32, 32, k // 4, 4).permute(0, 2, 1, 3).contiguous()


def int8_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    return codes, torch.rand(n, generator=generator) * 0.01 + 0.001


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "out_dtype"), [(F32, BF16, BF16), (BF16, F32, F16), (F16, F16, F32)]
)
def test_rms_norm(
    bench: Any, x_dtype: torch.dtype, weight_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    x, weight = bench.random(3, 64, dtype=x_dtype), bench.random(64, dtype=weight_dtype, seed=2)
    out = bench.empty(3, 64, dtype=out_dtype)
    bench.kernels.rms_norm(bench.stream, bench.put(x), bench.put(weight), 1e-6, out)
    scale = (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt()
    assert_close(bench.get(out), x.double() * scale * weight.double())


@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(BF16, F32), (F16, F16), (BF16, BF16)])
def test_int8_gemm(bench: Any, tokens: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    codes, scales = int8_weight(64, 128)
    x = bench.random(tokens, 128, dtype=dtype)
    out = bench.empty(tokens, 64, dtype=out_dtype)
    bench.kernels.int8_gemm(bench.stream, bench.put(x), bench.put(tiled(codes)), bench.put(scales), out)
    assert_close(bench.get(out), x.double() @ (codes.double() * scales.double()[:, None]).T)


def test_int8_gemm_adds_to_what_is_there_and_takes_rows_that_lie_apart(bench: Any) -> None:
    codes, scales = int8_weight(64, 128)
    wide, hidden = bench.random(12, 192, dtype=BF16), bench.random(12, 64, seed=4)
    placed = bench.put(hidden)
    x = bench.put(wide)[:, 64:]
    bench.kernels.int8_gemm(
        bench.stream, x, bench.put(tiled(codes)), bench.put(scales), placed, residual=placed
    )
    expected = hidden.double() + wide[:, 64:].double() @ (codes.double() * scales.double()[:, None]).T
    assert_close(bench.get(placed), expected)


def test_int8_dequant(bench: Any) -> None:
    codes, scales = int8_weight(64, 128)
    out = bench.empty(64, 128, dtype=BF16)
    bench.kernels.int8_dequant(bench.stream, bench.put(tiled(codes)), bench.put(scales), out)
    assert torch.equal(bench.get(out), (codes.float() * scales[:, None]).to(BF16))


def test_shapes_and_types_are_refused(bench: Any) -> None:
    kernels, stream = bench.kernels, bench.stream
    x, weight, out = bench.empty(3, 64), bench.empty(64), bench.empty(3, 64)
    with pytest.raises(NativeError, match=r"rms_norm\.weight.*float32 \[63\]"):
        kernels.rms_norm(stream, x, bench.empty(63), 1e-6, out)
    with pytest.raises(NativeError, match=r"rms_norm\.out.*float64"):
        kernels.rms_norm(stream, x, weight, 1e-6, bench.empty(3, 64, dtype=torch.float64))
    with pytest.raises(NativeError, match="contiguous"):
        kernels.rms_norm(stream, bench.empty(64, 3).T, weight, 1e-6, out)
    with pytest.raises(NativeError, match="not aligned"):
        kernels.rms_norm(stream, bench.empty(3 * 64 + 1)[1:].view(3, 64), weight, 1e-6, out)
    codes, scales = bench.empty(2, 32, 32, 4, dtype=torch.int8), bench.empty(64)
    half = bench.empty(3, 128, dtype=BF16)
    with pytest.raises(NativeError, match=r"int8_gemm\.x"):
        kernels.int8_gemm(stream, bench.empty(3, 128), codes, scales, out)
    with pytest.raises(NativeError, match=r"int8_gemm\.out.*float16"):
        kernels.int8_gemm(stream, half, codes, scales, bench.empty(3, 64, dtype=F16))
    with pytest.raises(NativeError, match=r"int8_gemm\.codes"):
        kernels.int8_gemm(stream, half, codes[:1], scales, out)
    with pytest.raises(NativeError, match="unlike those of out"):
        kernels.int8_gemm(stream, half, codes, scales, bench.empty(3, 128)[:, :64], residual=out)


def test_no_tokens_launch_nothing(bench: Any) -> None:
    codes, scales = bench.empty(2, 32, 32, 4, dtype=torch.int8), bench.empty(64)
    bench.kernels.rms_norm(bench.stream, bench.empty(0, 64), bench.empty(64), 1e-6, bench.empty(0, 64))
    bench.kernels.int8_gemm(bench.stream, bench.empty(0, 128, dtype=BF16), codes, scales, bench.empty(0, 64))
    bench.device.synchronize()
    assert "rms_norm" not in str(getattr(bench.device, "executed_orders", []))
