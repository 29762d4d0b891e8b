"""Marlin's bits against vectors made by two public packers, the closed form, and the native packer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.layouts import MarlinLayout, float32_to_bf16
from krasis.formats.layouts import marlin as layout

CASES = {
    "k128n256g128": (4, 128),
    "k256n256g128": (4, 128),
    "k256n256gm1": (4, None),
    "k256n256g64": (4, 64),
    "k256n256g32": (4, 32),
    "k256n256g128w8": (8, 128),
    "k256n256gm1w8": (8, None),
}


def test_every_golden_case_is_known(golden):
    assert {key.split("__")[0] for key in golden} - {"zp4"} == set(CASES)


IST_CASES = ("k128n256g128", "k256n256g128", "k256n256gm1")


@pytest.mark.parametrize(
    ("case", "packer"), [*((case, "vllm") for case in CASES), *((case, "ist") for case in IST_CASES)]
)
def test_codes_and_scales_equal_golden_vectors(golden, case, packer):
    bits, group = CASES[case]
    codes, scales = golden[f"{case}__q"], golden[f"{case}__s"]
    k = codes.shape[0]
    expected = golden[f"{case}__{packer}_qweight"].view(np.uint32)
    words = layout.pack_codes(codes, bits)
    np.testing.assert_array_equal(words, expected)
    np.testing.assert_array_equal(layout.unpack_codes(expected, bits), codes)
    permuted = layout.permute_scales(scales, k, group or k)
    np.testing.assert_array_equal(permuted, golden[f"{case}__{packer}_scales"].reshape(scales.shape))
    np.testing.assert_array_equal(layout.unpermute_scales(permuted, k, group or k), scales)


@pytest.mark.parametrize("case", [case for case, (bits, _) in CASES.items() if bits == 4])
def test_native_packer_recovers_golden_vectors(golden, pool, view, marlin, case):
    """Weights that are exactly code * scale are packed without error, into the vectors themselves."""
    group = CASES[case][1]
    codes, scales = golden[f"{case}__q"], golden[f"{case}__s"]
    k, n = codes.shape
    group = group or k
    values = (codes.astype(np.float32) - 8).reshape(k // group, group, n) * scales.astype(np.float32)[:, None]
    weights = values.reshape(k, n).T
    words, packed_scales, stats = marlin(pool, view(weights, "F32"), group=group, scale_dtype="F16")
    dequantised = MarlinLayout(4, None if group == k else group, "F16").dequantize(words, packed_scales)
    # A group without the level -8 may be stored as its mirror image, which is as good.
    full = np.repeat((codes.reshape(k // group, group, n) == 0).any(axis=1), group, axis=0)
    assert full.mean() > 0.8
    np.testing.assert_array_equal(layout.unpack_codes(words, 4)[full], codes[full])
    if full.all():
        np.testing.assert_array_equal(words, golden[f"{case}__vllm_qweight"].view(np.uint32))
        np.testing.assert_array_equal(
            packed_scales.view(np.float16), golden[f"{case}__vllm_scales"].reshape(scales.shape)
        )
    np.testing.assert_array_equal(dequantised[full], weights.T[full])
    assert stats.relative_mse < 2e-4


@pytest.mark.parametrize(
    ("k", "n", "column", "nibble"),
    [
        (0, 0, 0, 0),
        (1, 0, 0, 4),
        (8, 0, 0, 1),
        (9, 0, 0, 5),
        (0, 8, 0, 2),
        (2, 0, 4, 0),
        (0, 1, 16, 0),
        (0, 16, 1, 0),
        (5, 37, 90, 4),
        (15, 63, 127, 7),
    ],
)
def test_check_values(k, n, column, nibble):
    codes = np.zeros((32, 128), np.uint8)
    codes[16 + k, 64 + n] = 15
    expected = np.zeros((2, 256), np.uint32)
    expected[1, 128 + column] = 15 << (4 * nibble)
    np.testing.assert_array_equal(layout.pack_codes(codes, 4), expected)


def test_8_bit_words_follow_the_closed_form():
    codes = np.random.default_rng(3).integers(0, 256, (48, 192), dtype=np.uint8)
    expected = np.zeros((3, 4 * 192), np.uint32)
    for k in range(48):
        for n in range(192):
            r, c = k % 16, n % 16
            lane = (c % 8) * 4 + (r % 8) // 2
            column = n // 64 * 256 + lane * 8 + 2 * (n % 64 // 16) + c // 8
            expected[k // 16, column] |= np.uint32(codes[k, n]) << np.uint32(8 * (r // 8 + 2 * (r % 2)))
    np.testing.assert_array_equal(layout.pack_codes(codes, 8), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
def test_codes_round_trip(k_tiles, n_tiles, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (16 * k_tiles, 64 * n_tiles), dtype=np.uint8)
    np.testing.assert_array_equal(layout.unpack_codes(layout.pack_codes(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 384])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_native_words_are_the_layout_of_their_codes(pool, view, weights, marlin, bits, group, dtype):
    """Dequantising what was packed gives the weights back within half a step: no weight is out of place."""
    matrix = view(weights(128, 384, seed=group), dtype)
    words, scales, stats = marlin(pool, matrix, bits, group, "F16")
    codes = layout.unpack_codes(words, bits)
    np.testing.assert_array_equal(layout.pack_codes(codes, bits), words)
    found = MarlinLayout(bits, None if group == 384 else group, "F16").dequantize(words, scales)
    source = matrix.to_float32().T
    step = np.repeat(np.abs(layout.unpermute_scales(scales, 384, group).view(np.float16)), group, axis=0)
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert (np.abs(found - source)[inside] <= 0.5001 * step[inside]).all()
    error = ((found - source).astype(np.float64) ** 2).sum()
    assert stats.squared_error == pytest.approx(error, rel=1e-5)
    assert stats.squared_sum == pytest.approx((source.astype(np.float64) ** 2).sum(), rel=1e-5)
    assert stats.max_abs_error == pytest.approx(np.abs(found - source).max(), rel=1e-6)
    assert stats.count == source.size


def test_columns_are_written_at_their_offset_and_nowhere_else(pool, view, weights, marlin):
    from krasis.formats.layouts import native_pack

    matrix = view(weights(64, 256))
    alone, alone_scales, _ = marlin(pool, matrix)
    words = np.full((16, 2 * 192), 7, np.uint32)
    scales = np.full((2, 192), 7, np.uint16)
    native_pack.pack_marlin(pool, matrix, words, scales, bits=4, group=128, scale_dtype="BF16", n_offset=64)
    np.testing.assert_array_equal(words[:, 128:256], alone)
    np.testing.assert_array_equal(scales[:, 64:128], alone_scales)
    assert (words[:, :128] == 7).all()
    assert (words[:, 256:] == 7).all()
    assert (scales[:, :64] == 7).all()
    assert (scales[:, 128:] == 7).all()


def test_strided_rows_are_read_in_place(pool, view, weights, marlin):
    whole = view(weights(64, 512))
    strided = type(whole)(whole.data[:, 128:384], "BF16")
    copied = type(whole)(np.ascontiguousarray(whole.data[:, 128:384]), "BF16")
    for got, expected in zip(marlin(pool, strided), marlin(pool, copied), strict=True):
        assert np.array_equal(got, expected) if isinstance(got, np.ndarray) else got == expected


def test_expert_record_sections_are_aligned_and_sized():
    record = MarlinLayout(4, 128).expert_record(2048, 768)
    assert record.w13_codes.num_bytes == 2048 // 16 * (2 * 1536) * 4
    assert record.w13_scales.num_bytes == 16 * 1536 * 2
    assert record.w2_codes.num_bytes == 768 // 16 * (2 * 2048) * 4
    assert record.w2_scales.num_bytes == 6 * 2048 * 2
    assert all(section.offset_bytes % 256 == 0 for section in record.sections)
    assert record.record_bytes % 4096 == 0
    assert record.record_bytes - record.w2_scales.end_bytes < 4096


@pytest.mark.parametrize("bad", [{"bits": 3}, {"group": 48}, {"scale_dtype": "F32"}])
def test_unknown_parameters_are_refused(bad):
    with pytest.raises(UnsupportedModelError, match="no such Marlin layout"):
        MarlinLayout(**bad)


def test_a_group_that_does_not_divide_the_weight_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"group 128, 192 features.*Hint"):
        MarlinLayout(4, 128).expert_record(256, 192)
    assert MarlinLayout(4, None).expert_record(256, 192).w2_scales.num_bytes == 512


@pytest.mark.parametrize("shape", [(8, 64), (16, 32), (16,)])
def test_codes_off_the_tile_are_refused(shape):
    with pytest.raises(FormatError, match="Marlin codes"):
        layout.pack_codes(np.zeros(shape, np.uint8), 4)


def test_bfloat16_rounds_to_nearest_even():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF817FFF], np.uint32)
    np.testing.assert_array_equal(float32_to_bf16(bits.view(np.float32)), [0x3F80, 0x3F82, 0x3F81, 0xBF81])
