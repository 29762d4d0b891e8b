"""Weights, shapes and arguments that cannot be packed: named, and nothing silently wrong."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import FormatError, NativeError, UnsupportedModelError
from krasis.formats.layouts import (
    CpuTileLayout,
    Int8RowsLayout,
    MarlinLayout,
    MatrixView,
    PackStats,
    layout_from_id,
    native_pack,
)
from krasis.formats.layouts import marlin as marlin_layout
from krasis.formats.layouts.cpu_tiles import dequantize, unpack_tiles


def int8(pool, matrix, **more):
    codes = np.empty((matrix.n // 32, matrix.k // 4, 32, 4), np.int8)
    return native_pack.pack_int8_rows(pool, matrix, codes, np.empty(matrix.n, np.float32), **more)


@pytest.fixture(params=["marlin4", "marlin8", "marlin_channel", "q8", "i4", "int8"])
def packer(request, marlin, tiled):
    """packer(pool, matrix, where=...) for each way of packing floats."""
    return {
        "marlin4": marlin,
        "marlin8": lambda pool, matrix, **more: marlin(pool, matrix, 8, 64, **more),
        "marlin_channel": lambda pool, matrix, **more: marlin(pool, matrix, 4, matrix.k, **more),
        "q8": lambda pool, matrix, **more: tiled(pool, matrix, "q8", **more),
        "i4": lambda pool, matrix, **more: tiled(pool, matrix, "i4", **more),
        "int8": int8,
    }[request.param]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (127, 767), (77, 300), (9, 31)])
def test_a_weight_that_is_not_finite_is_named(pool, view, weights, packer, bad, row, column):
    values = weights(128, 768)
    for dtype in ("BF16", "F16", "F32"):
        matrix = view(values, dtype)
        data = matrix.data.view(np.uint16) if dtype != "F32" else matrix.data.view(np.uint32)
        pattern = np.array([bad], np.float32).view(np.uint32)[0]
        data[row, column] = {"BF16": pattern >> 16, "F16": np.float16(bad).view(np.uint16), "F32": pattern}[
            dtype
        ]
        with pytest.raises(
            FormatError, match=rf"blk\.3: NaN or infinity .*{bad} at row {row}, column {column}"
        ):
            packer(pool, matrix, where="blk.3")


def test_the_first_of_several_bad_rows_is_named(pool, view, weights, packer):
    values = weights(192, 768)
    values[[191, 70, 79, 66, 130], [0, 0, 3, 405, 0]] = np.nan
    with pytest.raises(FormatError, match="at row 66, column 405"):
        packer(pool, MatrixView(values, "F32"))


def test_weights_beyond_float16_scales_are_refused_not_clipped(pool, weights, marlin, tiled):
    values = weights(64, 128)
    values[40, 3] = 6e5
    matrix = MatrixView(values, "F32")
    with pytest.raises(
        FormatError, match=r"too large for a 16-bit.*600000 in row 40; limit 524032.*bfloat16"
    ):
        marlin(pool, matrix, 4, 128, "F16")
    with pytest.raises(FormatError, match="too large"):
        tiled(pool, matrix, "i4")
    assert np.isfinite(marlin(pool, matrix, 4, 128, "BF16")[2].squared_error)
    values[40, 3] = 9e6
    for refused in (lambda: marlin(pool, matrix, 8, 128, "F16"), lambda: tiled(pool, matrix, "q8")):
        with pytest.raises(FormatError, match="too large"):
            refused()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(-149, 127),
    st.sampled_from([(4, 128, "BF16"), (4, 32, "F16"), (8, 128, "BF16"), (4, 256, "BF16")]),
)
def test_any_magnitude_gives_usable_scales(both_pools, marlin, seed, exponent, form):
    """Scales are finite, not zero, and wrong by no more than rounding and clipping can explain."""
    bits, group, dtype = form
    if dtype == "F16" and exponent > 15:
        exponent -= 120
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.uniform(-1, 1, (64, 256)), exponent).astype(np.float32)
    values[rng.random((64, 256)) < 0.02] = 0
    results = [marlin(pool, MatrixView(values, "F32"), bits, group, dtype) for pool in both_pools]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    words, scales, stats = results[0]
    exponent_bits = 0x7F80 if dtype == "BF16" else 0x7C00
    assert ((scales & exponent_bits) != exponent_bits).all()
    assert ((scales & 0x7FFF) != 0).all()
    assert np.isfinite(stats.squared_error)
    assert np.isfinite(stats.squared_sum)
    found = MarlinLayout(bits, None if group == 256 else group, dtype).dequantize(words, scales)
    assert np.isfinite(found).all()
    if exponent > (-110 if dtype == "BF16" else -12):
        wide, wide_found = values.astype(np.float64), found.T.astype(np.float64)
        assert ((wide - wide_found) ** 2).sum() < 0.02 * (wide**2).sum()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-39])
def test_groups_of_zeros_have_scale_one(pool, marlin, tiled, value):
    matrix = MatrixView(np.full((64, 128), value, np.float32), "F32")
    for bits, zero, dtype, one in [(4, 8, "BF16", 0x3F80), (4, 8, "F16", 0x3C00), (8, 128, "BF16", 0x3F80)]:
        words, scales, stats = marlin(pool, matrix, bits, 64, dtype)
        assert (marlin_layout.unpack_codes(words, bits) == zero).all()
        assert (scales == one).all()
        assert stats.max_abs_error == abs(np.float32(value))
    codes, scales = unpack_tiles(tiled(pool, matrix, "i4")[0], "i4")
    assert (codes == 0).all()
    assert (scales == 1).all()
    codes, scales = unpack_tiles(tiled(pool, matrix, "q8")[0], "q8")
    assert (codes == 0).all()
    assert (scales == 0).all()  # as ggml stores it


def test_zero_rows_of_int8_have_scale_one(pool, view, weights):
    values = weights(64, 64)
    values[33] = 0
    codes, scales = np.empty((2, 16, 32, 4), np.int8), np.empty(64, np.float32)
    Int8RowsLayout().pack(pool, view(values), codes, scales)
    assert scales[33] == 1
    assert (codes[1, :, 1] == 0).all()
    assert (np.delete(scales, 33) < 0.01).all()


def test_one_outlier_in_a_group_survives(pool, marlin, tiled):
    values = np.full((64, 128), 1e-4, np.float32)
    values[:, 5] = 3.0
    matrix = MatrixView(values, "F32")
    words, scales, _ = marlin(pool, matrix, 4, 128, "BF16")
    found = MarlinLayout(4, None).dequantize(words, scales)
    assert np.abs(found[5] - 3).max() < 0.02
    codes, tile_scales = unpack_tiles(tiled(pool, matrix, "i4")[0], "i4")
    assert np.abs(dequantize(codes, tile_scales)[:, 5] - 3).max() < 0.02


@pytest.mark.parametrize(
    ("n", "k", "group", "status"),
    [
        (96, 128, 128, 2),
        (64, 136, 136, 2),
        (64, 192, 128, 2),
        (64, 128, 48, 1),
        (0, 128, 128, 1),
        (-64, 128, 64, 1),
    ],
)
def test_native_marlin_refuses_shapes(pool, n, k, group, status):
    """The C function itself, not its wrapper: nothing may be read or written."""
    src = np.zeros((128, 256), np.uint16)
    words, scales = np.full(8192, 7, np.uint32), np.full(4096, 7, np.uint16)
    function = native_pack._function("krasis_pack_marlin")
    got = function(
        pool.handle, src.ctypes.data, 1, n, k, max(k, 1), 4, group, 0, 192, None, words.ctypes.data,
        scales.ctypes.data, 1, None,
    )  # fmt: skip
    assert got == status
    assert (words == 7).all()


@pytest.mark.parametrize(
    "change",
    [
        {"src": None},
        {"dtype": 3},
        {"bits": 5},
        {"codes": None},
        {"scale_dtype": 0},
        {"n_offset": -64},
        {"n_offset": 128},
        {"row_stride": 127},
        {"n": 1 << 60},
        {"k": 1 << 50, "row_stride": 1 << 50},
    ],
    ids=str,
)
def test_native_marlin_refuses_arguments(pool, change):
    src = np.zeros((64, 128), np.uint16)
    words, scales = np.zeros((8, 256), np.uint32), np.zeros((1, 128), np.uint16)
    arguments = {
        "src": src.ctypes.data, "dtype": 1, "n": 64, "k": 128, "row_stride": 128, "bits": 4, "group": 128,
        "n_offset": 0, "n_total": 128, "importance": None, "codes": words.ctypes.data,
        "scales": scales.ctypes.data, "scale_dtype": 1,
    }  # fmt: skip
    function = native_pack._function("krasis_pack_marlin")
    assert function(pool.handle, *arguments.values(), None) == 0
    assert function(pool.handle, *(arguments | change).values(), None) == 1
    assert function(None, *arguments.values(), None) == 1


@pytest.mark.parametrize(("part_rows", "part_offset"), [(8, 0), (16, 8), (32, 16), (16, 32), (16, -16)])
def test_native_tiles_refuse_parts(pool, part_rows, part_offset):
    src = np.zeros((64, 64), np.uint16)
    out = np.zeros(1 << 16, np.uint8)
    function = native_pack._function("krasis_pack_cpu_tiles")
    got = function(
        pool.handle, 0, src.ctypes.data, 1, 64, 64, 64, part_rows, part_offset, None, out.ctypes.data, None
    )
    assert got == 1


@pytest.mark.parametrize(
    "importance",
    [
        np.ones(127, np.float32),
        np.ones(128, np.float64),
        np.zeros(128, np.float32),
        -np.ones(128, np.float32),
        np.full(128, np.nan, np.float32),
        np.ones(256, np.float32)[::2],
    ],
    ids=["short", "float64", "zero", "negative", "nan", "strided"],
)
def test_importance_of_the_wrong_form_is_refused(pool, view, weights, marlin, importance):
    with pytest.raises(FormatError, match="importance"):
        marlin(pool, view(weights(64, 128)), importance=importance)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 0.0])
def test_native_importance_is_checked_too(pool, value):
    src = np.zeros((64, 128), np.uint16)
    words, scales = np.zeros((8, 128), np.uint32), np.zeros((1, 64), np.uint16)
    importance = np.full(128, value, np.float32)
    got = native_pack._function("krasis_pack_marlin")(
        pool.handle, src.ctypes.data, 1, 64, 128, 128, 4, 128, 0, 64, importance.ctypes.data,
        words.ctypes.data, scales.ctypes.data, 1, None,
    )  # fmt: skip
    assert got == 1


@pytest.mark.parametrize(
    ("data", "dtype", "message"),
    [
        (np.zeros((4, 4), np.float64), "F32", "wrong dtype"),
        (np.zeros((4, 4), np.float32), "BF16", "wrong dtype"),
        (np.zeros((4, 4), ">f4"), "F32", "wrong dtype"),
        (np.zeros(16, np.float32), "F32", "two dimensions"),
        (np.zeros((0, 4), np.float32), "F32", "none empty"),
        (np.zeros((4, 4), np.float32).T, "F32", "contiguous"),
        (np.zeros((4, 4), np.float32)[::-1], "F32", "contiguous"),
        (np.zeros((4, 8), np.float32)[:, ::2], "F32", "contiguous"),
        (np.zeros((4, 35), np.uint8), "Q8_0", "whole blocks"),
        (np.zeros((4, 4), np.float32), "Q4_K", "unknown dtype"),
    ],
)
def test_matrices_of_the_wrong_form_are_refused(data, dtype, message):
    with pytest.raises(FormatError, match=message):
        MatrixView(data, dtype)


def test_outputs_of_the_wrong_form_are_refused(pool, view, weights):
    matrix = view(weights(64, 128))
    words, scales = np.zeros((8, 128), np.uint32), np.zeros((1, 64), np.uint16)
    bad_words = [words[:4], words.view(np.int32), np.zeros((8, 256), np.uint32)[:, ::2]]
    read_only = words.copy()
    read_only.flags.writeable = False
    for bad in [*bad_words, read_only]:
        with pytest.raises(NativeError, match="output array"):
            native_pack.pack_marlin(pool, matrix, bad, scales, bits=4, group=128, scale_dtype="BF16")
    with pytest.raises(NativeError, match="output array"):
        native_pack.pack_cpu_tiles(pool, matrix, np.zeros(100, np.uint8), tiles="q8")


@pytest.mark.parametrize(
    "layout", [MarlinLayout(4, 64), CpuTileLayout("q8")], ids=lambda layout: layout.layout_id
)
def test_experts_of_the_wrong_shape_are_refused(pool, view, weights, layout):
    gate, down = view(weights(64, 128)), view(weights(128, 64))
    out = np.zeros(layout.expert_record(128, 64).record_bytes, np.uint8)
    with pytest.raises(FormatError, match=r"e7\.up: expert matrix has the wrong shape"):
        layout.pack_expert(pool, gate, down, down, out, where="e7")
    with pytest.raises(FormatError, match=r"e7\.down: expert matrix has the wrong shape"):
        layout.pack_expert(pool, gate, gate, gate, out, where="e7")
    with pytest.raises(FormatError, match="expert record has the wrong form"):
        layout.pack_expert(pool, gate, gate, down, out[:-1])
    out.flags.writeable = False
    with pytest.raises(FormatError, match="read-only"):
        layout.pack_expert(pool, gate, gate, down, out)
    for hidden, intermediate in [(96, 64), (64, 32), (0, 64), (-64, 64)]:
        with pytest.raises(UnsupportedModelError, match="multiple of the tile"):
            layout.expert_record(hidden, intermediate)


def test_layout_ids_round_trip():
    layouts = [MarlinLayout(b, g, d) for b in (4, 8) for g in (32, 64, 128, None) for d in ("BF16", "F16")]
    for layout in [*layouts, CpuTileLayout("q8"), CpuTileLayout("i4"), Int8RowsLayout()]:
        assert layout_from_id(layout.layout_id) == layout
    assert layout_from_id("plain") is None
    assert MarlinLayout().layout_id == "marlin-u4b8-g128-bf16"
    assert MarlinLayout(8, None, "F16").layout_id == "marlin-u8b128-gchannel-f16"


@pytest.mark.parametrize(
    "unknown", ["", "marlin-u4b8-g96-bf16", "cpu-q8-r32-b32 ", "cpu-q8-r32-b32\n", "Plain"]
)
def test_unknown_layout_ids_are_refused(unknown):
    with pytest.raises(FormatError, match="unknown layout"):
        layout_from_id(unknown)


def test_statistics_add_up():
    total = PackStats(1.0, 4.0, 0.5, 10) + PackStats(3.0, 4.0, 0.25, 20)
    assert total == PackStats(4.0, 8.0, 0.5, 30)
    assert total.relative_mse == 0.5
    assert PackStats().relative_mse == 0


def test_native_statistics_are_added_to(pool):
    stats = native_pack._Stats(1.0, 2.0, 3.0, 4, -1)
    src = np.ones((32, 32), np.float32)
    out, scales = np.zeros(1024, np.int8), np.zeros(32, np.float32)
    function = native_pack._function("krasis_pack_int8_rows")
    status = function(
        pool.handle, src.ctypes.data, 0, 32, 32, 32, out.ctypes.data, scales.ctypes.data, ctypes.byref(stats)
    )
    assert status == 0
    assert (stats.squared_error, stats.max_abs_error, stats.count) == (pytest.approx(1.0), 3.0, 1028)
    assert stats.squared_sum == pytest.approx(1026)
