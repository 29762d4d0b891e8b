"""Native quantisers against NumPy's, each instruction set, any number of threads: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import quantiser_twins

from krasis.formats.layouts import (
    CpuTileLayout,
    Int8RowsLayout,
    MarlinLayout,
    float32_to_bf16,
    int8_rows,
)
from krasis.formats.layouts import (
    marlin as marlin_layout,
)
from krasis.formats.layouts.cpu_tiles import unpack_tiles
from krasis.formats.native import Pool

KINDS = ["gauss", "laplace", "t3"]


def scale_bits(scales, dtype):
    return float32_to_bf16(scales) if dtype == "BF16" else scales.astype(np.float16).view(np.uint16)


def test_fused_multiply_add_rounds_once():
    """Against exact rational arithmetic, on sums that cancel or tie."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    a = rng.standard_normal(400).astype(np.float32)
    b = rng.standard_normal(400).astype(np.float32)
    c = (-(a * b) * np.where(rng.random(400) < 0.5, 1, 1 + 2**-20)).astype(np.float32)
    c[::3] = np.float32(3) * np.float32(2) ** rng.integers(-40, 20, c[::3].size).astype(np.float32)
    found = quantiser_twins.fused_multiply_add(a, b, c)
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        below, above = np.nextafter(got, np.float32(-np.inf)), np.nextafter(got, np.float32(np.inf))
        error = abs(exact - Fraction(float(got)))
        assert error <= abs(exact - Fraction(float(below)))
        assert error <= abs(exact - Fraction(float(above)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_int4_marlin(pool, view, weights, marlin, kind, group, dtype):
    matrix = view(weights(64, 256, kind, seed=group))
    words, scales, _ = marlin(pool, matrix, 4, group, dtype)
    codes, expected = quantiser_twins.quantize_int4(matrix.to_float32(), group, dtype)
    np.testing.assert_array_equal(marlin_layout.unpack_codes(words, 4), codes.T)
    np.testing.assert_array_equal(
        marlin_layout.unpermute_scales(scales, 256, group), scale_bits(expected, dtype).T
    )


@pytest.mark.parametrize("group", [64, 256])
def test_int4_marlin_with_importance(pool, view, weights, marlin, group):
    matrix = view(weights(64, 256, "t3"))
    importance = np.random.default_rng(5).random(256).astype(np.float32) ** 4 * np.float32(1e3)
    importance[7] = 0
    words, scales, _ = marlin(pool, matrix, 4, group, "BF16", importance=importance)
    codes, expected = quantiser_twins.quantize_int4(matrix.to_float32(), group, "BF16", importance)
    np.testing.assert_array_equal(marlin_layout.unpack_codes(words, 4), codes.T)
    np.testing.assert_array_equal(
        marlin_layout.unpermute_scales(scales, 256, group), scale_bits(expected, "BF16").T
    )


@pytest.mark.parametrize("group", [128, 256])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_int8_marlin(pool, view, weights, marlin, group, dtype):
    matrix = view(weights(64, 256, "t3"))
    words, scales, _ = marlin(pool, matrix, 8, group, dtype)
    codes, expected = quantiser_twins.quantize_marlin_int8(matrix.to_float32(), group, dtype)
    np.testing.assert_array_equal(marlin_layout.unpack_codes(words, 8), codes.T)
    np.testing.assert_array_equal(
        marlin_layout.unpermute_scales(scales, 256, group), scale_bits(expected, dtype).T
    )


@pytest.mark.parametrize("kind", KINDS)
def test_i4_tiles(pool, view, weights, tiled, kind):
    matrix = view(weights(96, 160, kind))
    packed, _ = tiled(pool, matrix, "i4")
    codes, scales = unpack_tiles(packed, "i4")
    expected_codes, expected_scales = quantiser_twins.quantize_int4(matrix.to_float32(), 32, "F16")
    np.testing.assert_array_equal(codes, expected_codes.astype(np.int16) - 8)
    np.testing.assert_array_equal(scales.astype(np.float32), expected_scales)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_int8_rows(pool, view, weights, dtype):
    matrix = view(weights(96, 160, "laplace"), dtype)
    layout = Int8RowsLayout()
    codes = np.empty(layout.codes_shape(96, 160), np.int8)
    scales = np.empty(96, np.float32)
    stats = layout.pack(pool, matrix, codes, scales)
    expected_codes, expected_scales = quantiser_twins.quantize_int8_rows(matrix.to_float32())
    np.testing.assert_array_equal(int8_rows.unpack_codes(codes), expected_codes)
    np.testing.assert_array_equal(scales, expected_scales)
    error = (layout.unpack(codes, scales) - matrix.to_float32()).astype(np.float64)
    assert stats.squared_error == pytest.approx((error**2).sum(), rel=1e-5)
    assert stats.max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-5)


LAYOUTS = [
    MarlinLayout(4, 128, "BF16"),
    MarlinLayout(4, 32, "F16"),
    MarlinLayout(4, None, "BF16"),
    MarlinLayout(8, 64, "F16"),
    CpuTileLayout("q8"),
    CpuTileLayout("i4"),
]


def pack_expert(layout, pool, view, weights):
    gate, up, down = (
        view(weights(n, k, "t3", seed=i)) for i, (n, k) in enumerate([(128, 1152), (128, 1152), (1152, 128)])
    )
    out = np.full(layout.expert_record(1152, 128).record_bytes, 0xA5, np.uint8)
    return out, layout.pack_expert(pool, gate, up, down, out)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.layout_id)
def test_instruction_sets_agree_to_the_last_bit(both_pools, view, weights, layout):
    (first, first_stats), (second, second_stats) = (
        pack_expert(layout, pool, view, weights) for pool in both_pools
    )
    np.testing.assert_array_equal(first, second)
    assert first_stats == second_stats


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.layout_id)
def test_thread_counts_agree_to_the_last_bit(view, weights, layout):
    found = []
    for num_threads in (1, 2, 3, 7):
        with Pool(num_threads, "avx2") as pool:
            found.append(pack_expert(layout, pool, view, weights))
    for record, stats in found[1:]:
        np.testing.assert_array_equal(record, found[0][0])
        assert stats == found[0][1]
