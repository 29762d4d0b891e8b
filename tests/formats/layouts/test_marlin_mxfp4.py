"""MXFP4 in Marlin's tiles: bit for bit from blocks and back; the words are what Marlin's formulas give."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.layouts import MarlinMxfp4Layout, MatrixView, layout_from_id, marlin, mxfp4, native_pack
from krasis.formats.native import Pool

LAYOUT = MarlinMxfp4Layout()
HIDDEN, INNER = 192, 64
SHAPES = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))


def random_blocks(n: int, k: int, seed: int, least: int = 0, largest: int = 192) -> np.ndarray:
    """GGML's blocks [n, k/32 * 17], every code and scale."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (n, k // 32, 17), dtype=np.uint8)
    blocks[:, :, 0] = random.integers(least, largest + 1, blocks.shape[:2])
    return blocks.reshape(n, -1)


def packed(pool: Pool, parts: list[MatrixView]) -> tuple[np.ndarray, native_pack.PackStats]:
    record = np.full(LAYOUT.expert_record(HIDDEN, INNER).record_bytes, 0xA5, np.uint8)
    return record, LAYOUT.pack_expert(pool, *parts, record)


def test_every_bit_comes_back(pool: Pool) -> None:
    parts = [random_blocks(*shape, seed) for seed, shape in enumerate(SHAPES)]
    record, stats = packed(pool, [MatrixView(part, "MXFP4") for part in parts])
    for part, unpacked in zip(parts, LAYOUT.unpack_codes(record, HIDDEN, INNER), strict=True):
        np.testing.assert_array_equal(mxfp4.join_blocks(*unpacked), part)
    assert (stats.squared_error, stats.max_abs_error, stats.count) == (0.0, 0.0, 3 * HIDDEN * INNER)
    theirs = [quants.dequantize(part, gguf.GGMLQuantizationType.MXFP4) for part in parts]
    for ours, expected in zip(LAYOUT.unpack_expert(record, HIDDEN, INNER), theirs, strict=True):
        np.testing.assert_array_equal(ours, expected)
    sums = sum(np.square(part.astype(np.float64)).sum() for part in theirs)
    assert stats.squared_sum == pytest.approx(sums, rel=1e-12)
    assert layout_from_id(LAYOUT.layout_id) == LAYOUT


def test_words_are_the_numpy_twins(pool: Pool) -> None:
    parts = [random_blocks(*shape, 7 + seed) for seed, shape in enumerate(SHAPES)]
    record, _ = packed(pool, [MatrixView(part, "MXFP4") for part in parts])
    w13, w13_scales, w2, w2_scales = LAYOUT.views(record, HIDDEN, INNER)
    both = [np.concatenate(one) for one in zip(*map(mxfp4.split_blocks, parts[:2]), strict=True)]
    for (codes, scales), words, stored in (
        (both, w13, w13_scales),
        (mxfp4.split_blocks(parts[2]), w2, w2_scales),
    ):
        np.testing.assert_array_equal(words, marlin.pack_codes(np.ascontiguousarray(codes.T), 4))
        np.testing.assert_array_equal(stored, marlin.permute_scales(scales.T, codes.shape[1], 32))
    used = np.zeros(record.size, bool)
    for section in LAYOUT.expert_record(HIDDEN, INNER).sections:
        used[section.offset_bytes : section.end_bytes] = True
    assert not record[~used].any()


def test_floats_become_what_the_cpu_s_tiles_hold(pool: Pool) -> None:
    """Exactly, where MXFP4 can hold them."""
    parts = [MatrixView(random_blocks(*shape, 3, least=20), "MXFP4").to_float32() for shape in SHAPES]
    record, stats = packed(pool, [MatrixView(part, "F32") for part in parts])
    assert (stats.squared_error, stats.count) == (0.0, 3 * HIDDEN * INNER)
    for ours, part in zip(LAYOUT.unpack_expert(record, HIDDEN, INNER), parts, strict=True):
        np.testing.assert_array_equal(ours, part)


@pytest.mark.parametrize("scale", [193, 255])
def test_scales_beyond_the_kernels_are_refused(pool: Pool, scale: int) -> None:
    parts = [random_blocks(*shape, 5) for shape in SHAPES]
    parts[1][7, 17] = scale
    with pytest.raises(FormatError, match=f"beyond what the GPU's bfloat16 holds.*exponent {scale} in row 7"):
        packed(pool, [MatrixView(part, "MXFP4") for part in parts])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="hidden size of the experts is not a multiple"):
        LAYOUT.expert_record(96, 64)
    with pytest.raises(UnsupportedModelError, match="a block of MXFP4 does not divide"):
        LAYOUT.fitted((64, 80))
    record = LAYOUT.expert_record(2880, 2880)
    # 4.25 bits a weight; gpt-oss's experts need no padding but to whole pages.
    assert 0 <= record.record_bytes - 3 * 2880 * 2880 * 17 // 32 < 8192
