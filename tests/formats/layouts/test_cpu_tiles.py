"""CPU tiles: ggml's Q8_0 bit for bit, lossless re-tiling, fused rows, round trips."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import quantiser_twins
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import FormatError, NativeError, UnsupportedModelError
from krasis.formats.layouts import CpuTileLayout, MarlinLayout, MatrixView, native_pack
from krasis.formats.layouts.cpu_tiles import dequantize, fuse_rows, pack_tiles, split_rows, unpack_tiles

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def blocks_of(weights: np.ndarray) -> np.ndarray:
    """ggml's own quantisation of float32 [n, k], as raw blocks uint8 [n, k/32*34]."""
    return gguf.quants.quantize(weights, Q8_0)


def split_blocks(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [n, k] and scales float16 [n, k/32] of raw blocks."""
    shaped = blocks.reshape(len(blocks), -1, 34)
    scales = np.ascontiguousarray(shaped[..., :2]).view(np.float16)[..., 0]
    return np.ascontiguousarray(shaped[..., 2:]).view(np.int8).reshape(len(blocks), -1), scales


@pytest.mark.parametrize("tiles", ["q8", "i4"])
@settings(max_examples=20, deadline=None)
@given(strips=st.integers(1, 3), blocks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_tiles_round_trip(tiles, strips, blocks, seed):
    rng = np.random.default_rng(seed)
    low, high = (-8, 8) if tiles == "i4" else (-128, 128)
    codes = rng.integers(low, high, (32 * strips, 32 * blocks), dtype=np.int8)
    scales = rng.standard_normal((32 * strips, blocks)).astype(np.float16)
    packed = pack_tiles(codes, scales, tiles)
    assert packed.shape == (strips, blocks, 1088 if tiles == "q8" else 576)
    found_codes, found_scales = unpack_tiles(packed, tiles)
    np.testing.assert_array_equal(found_codes, codes)
    np.testing.assert_array_equal(found_scales, scales)


def test_bytes_of_a_q8_tile():
    codes = np.arange(64 * 64, dtype=np.int64).reshape(64, 64).astype(np.int8)
    scales = np.arange(128, dtype=np.float16).reshape(64, 2)
    packed = pack_tiles(codes, scales, "q8")
    for row, k in [(0, 0), (31, 31), (32, 5), (63, 40), (17, 63)]:
        tile = packed[row // 32, k // 32]
        assert tile[(k % 32 // 4) * 128 + (row % 32) * 4 + k % 4].view(np.int8) == codes[row, k]
        assert tile[1024:].view(np.float16)[row % 32] == scales[row, k // 32]


def test_bytes_of_an_i4_tile():
    codes = np.random.default_rng(0).integers(-8, 8, (64, 64), dtype=np.int8)
    packed = pack_tiles(codes, np.ones((64, 2), np.float16), "i4")
    for row, k in [(0, 0), (31, 31), (32, 5), (63, 40), (17, 63), (15, 4)]:
        tile = packed[row // 32, k // 32]
        byte = int(tile[(k % 32 // 4) * 64 + (row % 16) * 4 + k % 4])
        assert (byte >> (4 * (row % 32 // 16))) % 16 - 8 == codes[row, k]


@pytest.mark.parametrize("kind", ["gauss", "laplace", "t3"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_q8_from_floats_is_ggml_q8_0(pool, view, weights, tiled, kind, dtype):
    matrix = view(weights(128, 1024, kind, seed=3), dtype)
    packed, stats = tiled(pool, matrix, "q8")
    values = matrix.to_float32()
    expected_codes, expected_scales = split_blocks(blocks_of(values))
    codes, scales = unpack_tiles(packed, "q8")
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales.view(np.uint16), expected_scales.view(np.uint16))
    error = (dequantize(codes, scales) - values).astype(np.float64)
    assert stats.squared_error == pytest.approx((error**2).sum(), rel=1e-5)
    assert stats.max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-5)


def test_q8_ties_round_away_from_zero_as_ggml(pool, tiled):
    """absmax 127 makes d = 1, so that halves are ties."""
    values = np.tile(np.concatenate([[127.0], np.arange(-15, 16) + 0.5]), (32, 1)).astype(np.float32)
    values[:, -1] = np.nextafter(np.float32(0.5), np.float32(0))  # plus one half is 1.0 in float32
    values[16:] *= -1
    packed, _ = tiled(pool, MatrixView(values, "F32"), "q8")
    expected, _ = split_blocks(blocks_of(values))
    np.testing.assert_array_equal(unpack_tiles(packed, "q8")[0], expected)
    assert expected[0, 1] == -15  # -14.5
    twin_codes, _ = quantiser_twins.quantize_q8_0(values)
    np.testing.assert_array_equal(twin_codes, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-30, 6))
def test_q8_from_any_floats_is_ggml_q8_0(both_pools, tiled, seed, exponent):
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.standard_normal((32, 64)), exponent + rng.integers(-3, 4, (32, 64))).astype(
        np.float32
    )
    values[rng.random((32, 64)) < 0.1] = 0
    expected_codes, expected_scales = split_blocks(blocks_of(values))
    for pool in both_pools:
        codes, scales = unpack_tiles(tiled(pool, MatrixView(values, "F32"), "q8")[0], "q8")
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_array_equal(scales.view(np.uint16), expected_scales.view(np.uint16))


def random_blocks(n: int, k: int, seed: int) -> np.ndarray:
    """Any codes (-128 among them) and any finite scales, negative and denormal ones too."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n, k // 32, 34), dtype=np.uint8)
    scales = rng.integers(0, 65536, (n, k // 32), dtype=np.uint16)
    scales[(scales & 0x7C00) == 0x7C00] &= 0x83FF
    blocks[..., :2] = scales[..., None].view(np.uint8)
    return blocks.reshape(n, -1)


def test_q8_0_is_kept_exactly(pool, tiled):
    blocks = random_blocks(96, 1088, 1)
    packed, stats = tiled(pool, MatrixView(blocks, "Q8_0"), "q8")
    codes, scales = unpack_tiles(packed, "q8")
    expected_codes, expected_scales = split_blocks(blocks)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales.view(np.uint16), expected_scales.view(np.uint16))
    np.testing.assert_array_equal(dequantize(codes, scales), gguf.quants.dequantize(blocks, Q8_0))
    assert (stats.squared_error, stats.max_abs_error, stats.count) == (0, 0, 96 * 1088)
    assert stats.squared_sum == pytest.approx(
        (dequantize(codes, scales).astype(np.float64) ** 2).sum(), rel=1e-6
    )


@pytest.mark.parametrize("half", [0x7C00, 0xFC00, 0x7E01, 0xFFFF])
def test_q8_0_scale_that_is_not_finite_is_refused(pool, tiled, half):
    blocks = random_blocks(64, 64, 2)
    blocks[45, 34:36] = np.array([half], np.uint16).view(np.uint8)
    with pytest.raises(FormatError, match=r"x\.y: NaN or infinity among the weights .*at row 45, column 32"):
        tiled(pool, MatrixView(blocks, "Q8_0"), "q8", where="x.y")


def test_q8_0_does_not_go_into_i4_tiles(pool, tiled):
    with pytest.raises(NativeError, match="fit q8 tiles only"):
        tiled(pool, MatrixView(random_blocks(32, 32, 0), "Q8_0"), "i4")


@pytest.mark.parametrize("tiles", ["q8", "i4"])
def test_fused_parts_equal_the_fused_weight(pool, view, weights, tiled, tiles):
    gate, up = weights(64, 128, seed=1), weights(64, 128, "t3", seed=2)
    expected, _ = tiled(pool, view(fuse_rows(gate, up)), tiles)
    for order in [(0, 1), (1, 0)]:
        out = np.full(expected.size, 0x5A, np.uint8)
        for part in order:
            native_pack.pack_cpu_tiles(
                pool, view((gate, up)[part]), out, tiles=tiles, part_rows=16, part_offset=16 * part
            )
        np.testing.assert_array_equal(out, expected.ravel())


def test_fuse_rows_interleaves_by_16():
    gate, up = np.arange(32)[:, None], 100 + np.arange(32)[:, None]
    fused = fuse_rows(gate, up)[:, 0].tolist()
    assert fused == [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)]
    for found, expected in zip(split_rows(fuse_rows(gate, up)), (gate, up), strict=True):
        np.testing.assert_array_equal(found, expected)


EXPERT_LAYOUTS = [
    (CpuTileLayout("q8"), 4e-5),
    (CpuTileLayout("i4"), 0.0067),
    (MarlinLayout(4, 64, "BF16"), 0.0083),
    (MarlinLayout(4, None, "F16"), 0.012),
    (MarlinLayout(8, 64, "BF16"), 6e-5),
]


@pytest.mark.parametrize(
    ("layout", "allowed"), EXPERT_LAYOUTS, ids=lambda value: getattr(value, "layout_id", "")
)
def test_expert_record_round_trip(pool, view, weights, layout, allowed):
    hidden, intermediate = 256, 192
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    parts = [view(weights(*shape, seed=i)) for i, shape in enumerate(shapes.values())]
    record = layout.expert_record(hidden, intermediate)
    out = np.full(record.record_bytes, 0x5A, np.uint8)
    stats = layout.pack_expert(pool, *parts, out)
    error = 0.0
    for part, found in zip(parts, layout.unpack_expert(out, hidden, intermediate), strict=True):
        source = part.to_float32()
        assert found.shape == source.shape
        one = ((found - source).astype(np.float64) ** 2).sum()
        assert one < allowed * (source.astype(np.float64) ** 2).sum()
        error += one
    assert stats.squared_error == pytest.approx(error, rel=1e-5)
    assert stats.count == 3 * hidden * intermediate
    covered = np.zeros(record.record_bytes, bool)
    for section in record.sections:
        covered[section.offset_bytes : section.end_bytes] = True
    assert (out[~covered] == 0).all()


def test_expert_from_q8_0_is_lossless(pool):
    hidden, intermediate = 128, 64
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    parts = [random_blocks(*shape, seed=i) for i, shape in enumerate(shapes)]
    layout = CpuTileLayout("q8")
    out = np.full(layout.expert_record(hidden, intermediate).record_bytes, 0x5A, np.uint8)
    assert layout.pack_expert(pool, *(MatrixView(part, "Q8_0") for part in parts), out).squared_error == 0
    for (codes, scales), blocks in zip(layout.unpack_codes(out, hidden, intermediate), parts, strict=True):
        expected_codes, expected_scales = split_blocks(blocks)
        np.testing.assert_array_equal(codes, expected_codes)
        np.testing.assert_array_equal(scales.view(np.uint16), expected_scales.view(np.uint16))


def test_unknown_tiles_are_refused():
    with pytest.raises(UnsupportedModelError, match="no such CPU tiles"):
        CpuTileLayout("q4")
