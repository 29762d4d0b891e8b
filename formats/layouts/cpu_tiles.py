"""Weights for the CPU kernels: tiles of 32 rows x 32 columns in the order they are read, scales inside.

A tile of ``q8``: int8 [8 k4][32 rows][4 k], then 32 float16 scales (1088 bytes).
A tile of ``i4``: uint8 [8 k4][16][4 k], low nibble row j, high nibble row 16 + j, code q + 8, then the scales
(576 bytes). A tile of ``mxfp4``: see ``mxfp4``. The tiles of 32 rows lie one after the other along k. In w13,
rows 0..15 of tile row t are rows 16t.. of gate, rows 16..31 those of up, so that one tile gives both halves
of the gated unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.layouts import mxfp4, native_pack
from krasis.formats.layouts.expert_format import (
    Acceptance,
    ExpertTier,
    Int8Tile,
    Strips,
    accepts_floats,
    rounding_error,
)
from krasis.formats.layouts.expert_record import (
    ExpertPacker,
    ExpertRecord,
    Part,
    check_expert_sizes,
    check_part,
    check_record,
    lay_out,
)
from krasis.formats.layouts.matrix import MatrixView, PackStats
from krasis.formats.layouts.mxfp4_blocks import as_mxfp4
from krasis.formats.native import Pool

TILE_ROWS, BLOCK_K = 32, 32
TILE_BYTES = {"q8": 1088, "i4": 576, "mxfp4": mxfp4.TILE_BYTES}
SCALES_BYTES = 64  # at the end of a tile
SECTION_ALIGNMENT_BYTES = 64
GATE_UP_ROWS = 32  # of gate and of up: what one unit of w13 computes

_LAYOUT_ID = re.compile(r"cpu-(q8|i4|mxfp4)-r32-b32")

Array = npt.NDArray[Any]


def pack_tiles(
    codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16], tiles: str
) -> npt.NDArray[np.uint8]:
    """Codes int8 [n, k] (i4: -8..7) and scales float16 [n, k/32] as tiles uint8 [n/32, k/32, tile bytes]."""
    n, k = codes.shape
    if n % TILE_ROWS or k % BLOCK_K or scales.shape != (n, k // BLOCK_K) or scales.dtype != np.float16:
        raise FormatError(
            "codes and scales do not form tiles", got=f"codes {codes.shape}, scales {scales.shape}"
        )
    # [n/32, 32 rows, k/32, 8 k4, 4 k] -> [n/32, k/32, k4, rows, 4 k]
    split = codes.reshape(n // 32, 32, k // 32, 8, 4).transpose(0, 2, 3, 1, 4)
    if tiles == "i4":
        biased = (split + np.int8(8)).astype(np.uint8)
        body = biased[:, :, :, :16] | (biased[:, :, :, 16:] << np.uint8(4))
    else:
        body = (
            split.view(np.uint8) if split.flags.c_contiguous else np.ascontiguousarray(split).view(np.uint8)
        )
    tail = np.ascontiguousarray(scales.reshape(n // 32, 32, k // 32).transpose(0, 2, 1)).view(np.uint8)
    return np.concatenate([body.reshape(n // 32, k // 32, -1), tail.reshape(n // 32, k // 32, -1)], axis=2)


def unpack_tiles(
    packed: npt.NDArray[np.uint8], tiles: str
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Inverse of ``pack_tiles``: codes int8 [n, k] and scales float16 [n, k/32]."""
    strips, blocks, tile_bytes = packed.shape
    if tile_bytes != TILE_BYTES[tiles] or packed.dtype != np.uint8:
        raise FormatError(
            "not tiles", got=f"{packed.dtype} {packed.shape}", limit=f"{TILE_BYTES[tiles]} bytes a tile"
        )
    body, tail = packed[:, :, : tile_bytes - SCALES_BYTES], packed[:, :, tile_bytes - SCALES_BYTES :]
    if tiles == "i4":
        pairs = body.reshape(strips, blocks, 8, 16, 4)
        biased = np.concatenate([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=3)
        split = biased.view(np.int8) - np.int8(8)
    else:
        split = np.ascontiguousarray(body).view(np.int8).reshape(strips, blocks, 8, 32, 4)
    codes = np.ascontiguousarray(split.transpose(0, 3, 1, 2, 4)).reshape(strips * 32, blocks * 32)
    scales = np.ascontiguousarray(tail).view(np.float16).reshape(strips, blocks, 32)
    return codes, np.ascontiguousarray(scales.transpose(0, 2, 1)).reshape(strips * 32, blocks)


def fuse_rows(gate: Array, up: Array) -> Array:
    """Rows of gate and up [n, ...] interleaved by 16: [2n, ...]."""
    parts = [part.reshape(-1, 1, 16, *part.shape[1:]) for part in (gate, up)]
    return np.concatenate(parts, axis=1).reshape(-1, *gate.shape[1:])


def split_rows(fused: Array) -> tuple[Array, Array]:
    """Inverse of ``fuse_rows``."""
    parts = fused.reshape(-1, 2, 16, *fused.shape[1:])
    gate, up = (np.ascontiguousarray(parts[:, i]).reshape(-1, *fused.shape[1:]) for i in (0, 1))
    return gate, up


@dataclass(frozen=True, slots=True)
class CpuTileLayout(ExpertPacker):
    """Experts for the CPU. tiles: ``q8``, ``i4`` or ``mxfp4``. Raises UnsupportedModelError for others."""

    tiles: str = "q8"

    def __post_init__(self) -> None:
        if self.tiles not in TILE_BYTES:
            raise UnsupportedModelError("no such CPU tiles", got=self.tiles, limit=", ".join(TILE_BYTES))

    @property
    def layout_id(self) -> str:
        """The name a bundle stores: ``cpu-q8-r32-b32``, ``cpu-i4-r32-b32`` or ``cpu-mxfp4-r32-b32``."""
        return f"cpu-{self.tiles}-r32-b32"

    @classmethod
    def from_id(cls, layout_id: str) -> CpuTileLayout | None:
        """The tiles of a layout id; None for an id of others."""
        match = _LAYOUT_ID.fullmatch(layout_id)
        return None if match is None else cls(match.group(1))

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.tiles == "q8" else 4

    @property
    def tier(self) -> ExpertTier:
        """The CPU's copy."""
        return "cpu"

    @property
    def backends(self) -> frozenset[ExpertTier]:
        """The CPU."""
        return frozenset({"cpu"})

    @property
    def scale_dtype(self) -> str:
        """``F16``, of ``mxfp4`` ``E8M0``."""
        return "E8M0" if self.tiles == "mxfp4" else "F16"

    @property
    def int8_tile(self) -> Int8Tile | None:
        """A tile of ``q8``; None for 4 bits."""
        return Int8Tile(TILE_BYTES["q8"], SCALES_BYTES) if self.tiles == "q8" else None

    def group_of(self, k: int, where: str = "") -> int:
        """Always a block. Raises UnsupportedModelError unless it divides k."""
        if k % BLOCK_K:
            raise UnsupportedModelError(
                "the block of a tile does not divide the input features",
                where=where or self.layout_id,
                got=k,
                limit=f"a multiple of {BLOCK_K}",
            )
        return BLOCK_K

    def fitted(self, sizes: Iterable[int]) -> CpuTileLayout:
        """These tiles: there are no others. Raises UnsupportedModelError for sizes they do not fit."""
        for size in sizes:
            self.group_of(size)
        return self

    def accepts(self, dtype: str) -> Acceptance:
        """Tiles of ``q8`` keep codes and scales of Q8_0, those of ``mxfp4`` of MXFP4."""
        kept = {"q8": "Q8_0", "mxfp4": "MXFP4"}.get(self.tiles)
        return "as is" if dtype == kept else accepts_floats(dtype)

    def explained_error(self, k: int) -> float:
        """See ``Layout``."""
        return rounding_error(self.bits, BLOCK_K)

    def strips(
        self, shape: tuple[int, ...], num_bytes: int, hidden: int, intermediate: int, gated: bool = True
    ) -> Iterator[Strips]:
        """Of each expert the rows of w13, and mirrored those of w2."""
        record = self.expert_record(hidden, intermediate, gated)
        w13, w2 = record.w13_codes, record.w2_codes
        for begin in range(0, num_bytes, record.record_bytes):
            yield Strips(begin + w13.offset_bytes, w13.num_bytes, intermediate // GATE_UP_ROWS)
            yield Strips(begin + w2.offset_bytes, w2.num_bytes, hidden // TILE_ROWS, mirrored=True)

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of a tiled weight [n, k]."""
        return (n // TILE_ROWS) * (k // BLOCK_K) * TILE_BYTES[self.tiles]

    def expert_record(self, hidden: int, intermediate: int, gated: bool = True) -> ExpertRecord:
        """Sections of one expert; scales are inside the tiles. Raises UnsupportedModelError for odd sizes."""
        check_expert_sizes(hidden, intermediate, self.layout_id)
        return lay_out(
            {
                "w13_codes": self.weight_bytes((2 if gated else 1) * intermediate, hidden),
                "w13_scales": 0,
                "w2_codes": self.weight_bytes(hidden, intermediate),
                "w2_scales": 0,
            },
            SECTION_ALIGNMENT_BYTES,
        )

    def pack_part(
        self,
        pool: Pool,
        part: Part,
        matrix: MatrixView,
        out: npt.NDArray[np.uint8],
        *,
        hidden: int,
        intermediate: int,
        gated: bool = True,
        importance: npt.NDArray[np.float32] | None = None,
        where: str = "",
    ) -> PackStats:
        """Packs one matrix of an expert (Q8_0, MXFP4 without loss) into its rows of a record, ``out``.

        importance: not for ``mxfp4``, whose scales are powers of two.
        """
        check_part(part, matrix, hidden, intermediate, where)
        spec = self.expert_record(hidden, intermediate, gated)
        check_record(out, spec, where, writable=True)
        section = spec.w2_codes if part == "down" else spec.w13_codes
        if self.tiles == "mxfp4" and matrix.dtype != "MXFP4":
            blocks, lost = as_mxfp4(matrix, where)
            packed = self.pack_part(
                pool,
                part,
                blocks,
                out,
                hidden=hidden,
                intermediate=intermediate,
                gated=gated,
                where=where,
            )
            return replace(lost, count=packed.count)
        return native_pack.pack_cpu_tiles(
            pool,
            matrix,
            section.of(out),
            tiles=self.tiles,
            part_rows=16 if gated and part != "down" else 32,
            part_offset=16 if gated and part == "up" else 0,
            importance=importance,
            where=where,
        )

    def unpack_codes(
        self, record: npt.NDArray[np.uint8], hidden: int, intermediate: int, gated: bool = True
    ) -> tuple[tuple[Array, Array], tuple[Array, Array], tuple[Array, Array]]:
        """(codes int8 [n, k], scales float16 [n, k/32]) of gate, up and down, exactly as stored; of ``mxfp4``
        both uint8. Without a gate that has no rows.
        """
        spec = self.expert_record(hidden, intermediate, gated)
        check_record(record, spec, self.layout_id, writable=False)
        tile_bytes = TILE_BYTES[self.tiles]
        w13 = spec.w13_codes.of(record).reshape(-1, hidden // 32, tile_bytes)
        w2 = spec.w2_codes.of(record).reshape(hidden // 32, intermediate // 32, tile_bytes)
        both, down = [
            mxfp4.unpack_tiles(one) if self.tiles == "mxfp4" else unpack_tiles(one, self.tiles)
            for one in (w13, w2)
        ]
        if not gated:
            return (both[0][:0], both[1][:0]), both, down
        (gate, up), (gate_scales, up_scales) = split_rows(both[0]), split_rows(both[1])
        return (gate, gate_scales), (up, up_scales), down

    def unpack_expert(
        self, record: npt.NDArray[np.uint8], hidden: int, intermediate: int, gated: bool = True
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """gate, up [intermediate, hidden] and down [hidden, intermediate], dequantised."""
        made = mxfp4.dequantize if self.tiles == "mxfp4" else dequantize
        parts = self.unpack_codes(record, hidden, intermediate, gated)
        gate, up, down = (made(*part) for part in parts)
        return gate, up, down


def dequantize(codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """Codes [n, k] times scales [n, k/32], in float32."""
    n, k = codes.shape
    blocks = codes.reshape(n, k // BLOCK_K, BLOCK_K).astype(np.float32)
    return (blocks * scales.astype(np.float32)[:, :, None]).reshape(n, k)
