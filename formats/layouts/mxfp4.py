"""MXFP4 weights: blocks of 32 E2M1 codes with an E8M0 scale, as GGML stores them and as tiles of the CPU
kernels.

A block of GGML: the scale e (weights are E2M1 * 2^(e - 127)), then 16 bytes, byte j with elements j (low) and
j + 16. A tile of ``mxfp4``: uint8 [8 k4][16][4 k], low nibble row j, high nibble row 16 + j, then the scales
of 32 rows (544 bytes). Both hold the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

BLOCK_K, BLOCK_BYTES = 32, 17
TILE_BYTES, TILE_ROWS, SCALES_BYTES = 544, 32, 32
LARGEST_SCALE = 252  # above it float32 cannot hold all weights
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_TINIEST = np.float32(2.0**-120)  # what is below counts as zero: an exponent must fit
_ROWS_AT_ONCE = 64  # gguf's quantiser needs 64 bytes a weight


def blocks_of_pairs(codes: Bytes, scales: Bytes) -> Bytes:
    """GGML's blocks [n, k/32 * 17] of gpt-oss's tensors: codes [n, k/32, 16], byte j with elements 2j (low)
    and 2j + 1, and scales [n, k/32].
    """
    n, blocks = scales.shape
    if codes.shape != (n, blocks, BLOCK_K // 2) or codes.dtype != np.uint8 or scales.dtype != np.uint8:
        raise FormatError("codes and scales of MXFP4 do not fit", got=f"{codes.shape}, {scales.shape}")
    out = np.empty((n, blocks, BLOCK_BYTES), np.uint8)
    first, second = codes[:, :, :8], codes[:, :, 8:]
    out[:, :, 0] = scales
    out[:, :, 1::2] = (first & np.uint8(15)) | (second << np.uint8(4))
    out[:, :, 2::2] = (first >> np.uint8(4)) | (second & np.uint8(0xF0))
    return out.reshape(n, -1)


def split_blocks(blocks: Bytes) -> tuple[Bytes, Bytes]:
    """Codes [n, k], one a byte, and scales [n, k/32] of GGML's blocks [n, k/32 * 17]."""
    split = blocks.reshape(blocks.shape[0], -1, BLOCK_BYTES)
    nibbles = split[:, :, 1:]
    codes = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=2)
    return codes.reshape(blocks.shape[0], -1), np.ascontiguousarray(split[:, :, 0])


def join_blocks(codes: Bytes, scales: Bytes) -> Bytes:
    """Inverse of ``split_blocks``."""
    n, blocks = scales.shape
    halves = codes.reshape(n, blocks, 2, BLOCK_K // 2)
    nibbles = halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))
    return np.concatenate([scales[:, :, None], nibbles], axis=2).reshape(n, -1)


def pack_tiles(codes: Bytes, scales: Bytes) -> Bytes:
    """Codes [n, k], one a byte, and scales [n, k/32] as tiles [n/32, k/32, 544]."""
    n, k = codes.shape
    split = codes.reshape(n // TILE_ROWS, 2, 16, k // BLOCK_K, 8, 4).transpose(0, 3, 1, 4, 2, 5)
    body = split[:, :, 0] | (split[:, :, 1] << np.uint8(4))
    tail = scales.reshape(n // TILE_ROWS, TILE_ROWS, -1).transpose(0, 2, 1)
    return np.concatenate([body.reshape(n // TILE_ROWS, k // BLOCK_K, -1), tail], axis=2)


def unpack_tiles(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Inverse of ``pack_tiles``. Raises FormatError for what are no such tiles."""
    strips, blocks, tile_bytes = packed.shape
    if tile_bytes != TILE_BYTES or packed.dtype != np.uint8:
        raise FormatError(
            "not tiles", got=f"{packed.dtype} {packed.shape}", limit=f"{TILE_BYTES} bytes a tile"
        )
    pairs = packed[:, :, :-SCALES_BYTES].reshape(strips, blocks, 8, 16, 4)
    split = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)])  # [half, strip, block, k4, row, k]
    codes = np.ascontiguousarray(split.transpose(1, 0, 4, 2, 3, 5)).reshape(strips * TILE_ROWS, -1)
    scales = packed[:, :, -SCALES_BYTES:].transpose(0, 2, 1)
    return codes, np.ascontiguousarray(scales).reshape(strips * TILE_ROWS, blocks)


def dequantize(codes: Bytes, scales: Bytes) -> Floats:
    """Weights [n, k] of codes [n, k] and scales [n, k/32], exact in float32."""
    n, k = codes.shape
    values = VALUES[codes].reshape(n, k // BLOCK_K, BLOCK_K)
    return np.ldexp(values, scales.astype(np.int32)[:, :, None] - 127).reshape(n, k)


def quantize(weights: Floats) -> Bytes:
    """GGML's blocks [n, k/32 * 17] of finite weights [n, k]; what MXFP4 can hold is held exactly."""
    import gguf  # 30 ms, which a model that is run does not need
    from gguf import quants

    n, k = weights.shape
    out = np.empty((n, k // BLOCK_K * BLOCK_BYTES), np.uint8)
    for begin in range(0, n, _ROWS_AT_ONCE):
        rows = weights[begin : begin + _ROWS_AT_ONCE]
        kept = np.where(np.abs(rows) < _TINIEST, np.float32(0), rows)
        out[begin : begin + rows.shape[0]] = quants.quantize(kept, gguf.GGMLQuantizationType.MXFP4)
    return out
