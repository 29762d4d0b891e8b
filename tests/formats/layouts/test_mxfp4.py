"""MXFP4: bit for bit from blocks into tiles and back; the gguf package reads the same weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants

from krasis.formats.errors import FormatError, NativeError
from krasis.formats.layouts import CpuTileLayout, MatrixView, mxfp4, native_pack

LAYOUT = CpuTileLayout("mxfp4")
HIDDEN, INNER = 128, 64


def random_blocks(
    n: int, k: int, seed: int, least: int = 0, largest: int = mxfp4.LARGEST_SCALE
) -> np.ndarray:
    """GGML's blocks [n, k/32 * 17], every code and scale."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (n, k // 32, 17), dtype=np.uint8)
    blocks[:, :, 0] = random.integers(least, largest + 1, blocks.shape[:2])
    return blocks.reshape(n, -1)


def expert(seed: int, **scales: int) -> list[np.ndarray]:
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return [random_blocks(n, k, seed + i, **scales) for i, (n, k) in enumerate(shapes)]


def packed(pool, parts: list[MatrixView]) -> tuple[np.ndarray, native_pack.PackStats]:
    record = np.full(LAYOUT.expert_record(HIDDEN, INNER).record_bytes, 0xA5, np.uint8)
    return record, LAYOUT.pack_expert(pool, *parts, record)


def test_every_bit_comes_back(pool) -> None:
    parts = expert(1)
    record, stats = packed(pool, [MatrixView(part, "MXFP4") for part in parts])
    for part, unpacked in zip(parts, LAYOUT.unpack_codes(record, HIDDEN, INNER), strict=True):
        np.testing.assert_array_equal(mxfp4.join_blocks(*unpacked), part)
    assert (stats.squared_error, stats.max_abs_error, stats.count) == (0.0, 0.0, 3 * HIDDEN * INNER)
    theirs = [quants.dequantize(part, gguf.GGMLQuantizationType.MXFP4) for part in parts]
    for ours, expected in zip(LAYOUT.unpack_expert(record, HIDDEN, INNER), theirs, strict=True):
        np.testing.assert_array_equal(ours, expected)
    sums = sum(np.square(part.astype(np.float64)).sum() for part in theirs)
    assert stats.squared_sum == pytest.approx(sums, rel=1e-12)


def test_tiles_are_the_numpy_twins(pool, tiled) -> None:
    blocks = random_blocks(96, 160, 2)
    tiles, _ = tiled(pool, MatrixView(blocks, "MXFP4"), "mxfp4")
    np.testing.assert_array_equal(tiles, mxfp4.pack_tiles(*mxfp4.split_blocks(blocks)))
    with pytest.raises(FormatError, match="not tiles"):
        mxfp4.unpack_tiles(tiles[:, :, :-1])


def test_weights_that_mxfp4_can_hold_are_held_exactly(pool) -> None:
    """As of a checkpoint that somebody wrote out in BF16."""
    parts = [MatrixView(one, "MXFP4").to_float32() for one in expert(3, least=20, largest=250)]
    record, stats = packed(pool, [MatrixView(part, "F32") for part in parts])
    assert (stats.squared_error, stats.count) == (0.0, 3 * HIDDEN * INNER)
    for ours, part in zip(LAYOUT.unpack_expert(record, HIDDEN, INNER), parts, strict=True):
        np.testing.assert_array_equal(ours, part)


def test_other_weights_are_rounded_to_the_next_value(pool, weights) -> None:
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    parts = [weights(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    parts[0][0, :32] = 1e-40  # beyond any scale: zero
    record, stats = packed(pool, [MatrixView(part, "F32") for part in parts])
    found = LAYOUT.unpack_expert(record, HIDDEN, INNER)
    error = sum(
        np.square((ours - part).astype(np.float64)).sum() for ours, part in zip(found, parts, strict=True)
    )
    assert stats.squared_error == pytest.approx(error)
    assert 0.001 < stats.relative_mse < 0.03
    assert not found[0][0, :32].any()


def test_pairs_are_read_as_transformers_reads_them() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch = pytest.importorskip("torch")
    random = np.random.default_rng(4)
    codes = random.integers(0, 256, (6, 4, 16), dtype=np.uint8)
    scales = random.integers(100, 140, (6, 4), dtype=np.uint8)
    theirs = convert_moe_packed_tensors(
        torch.from_numpy(codes)[None], torch.from_numpy(scales)[None], dtype=torch.float32
    )
    ours = MatrixView(mxfp4.blocks_of_pairs(codes, scales), "MXFP4").to_float32()
    np.testing.assert_array_equal(ours, theirs[0].numpy().T)  # they turn the matrix


@pytest.mark.parametrize("scale", [253, 255])
def test_scales_beyond_float32_are_refused(pool, tiled, scale: int) -> None:
    blocks = random_blocks(32, 64, 5)
    blocks[7, 17] = scale
    with pytest.raises(FormatError, match=f"scale of an MXFP4 block is NaN.*got exponent {scale} in row 7"):
        tiled(pool, MatrixView(blocks, "MXFP4"), "mxfp4")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(pool, weights, bad: float) -> None:
    parts = [weights(INNER, HIDDEN), weights(INNER, HIDDEN), weights(HIDDEN, INNER)]
    parts[1][3, 4] = bad
    with pytest.raises(FormatError, match=r"NaN or infinity among the weights.*row 3, column 4"):
        packed(pool, [MatrixView(part, "F32") for part in parts])


def test_only_blocks_of_their_own_type_go_in_unchanged(pool, tiled, weights) -> None:
    with pytest.raises(NativeError, match="MXFP4 blocks fit mxfp4 tiles only"):
        tiled(pool, MatrixView(random_blocks(32, 32, 6), "MXFP4"), "q8")
    with pytest.raises(NativeError, match="take blocks of that type only"):
        tiled(pool, MatrixView(weights(32, 32), "F32"), "mxfp4")
    strided = MatrixView(random_blocks(64, 32, 7)[::2], "MXFP4")
    with pytest.raises(NativeError, match="rows of MXFP4 must be contiguous"):
        tiled(pool, strided, "mxfp4")
    with pytest.raises(FormatError, match="rows of MXFP4 must be whole blocks"):
        MatrixView(np.zeros((2, 18), np.uint8), "MXFP4")
    with pytest.raises(FormatError, match="codes and scales of MXFP4 do not fit"):
        mxfp4.blocks_of_pairs(np.zeros((2, 3, 16), np.uint8), np.zeros((2, 4), np.uint8))
