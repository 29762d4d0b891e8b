"""MXFP4 experts for the GPU, without loss: E2M1 codes in Marlin's tiles, a byte of scale for each 32.

Codes lie as the 4-bit codes of ``marlin`` do, uint32 [k/16, 2 n]. Scales e (weights are E2M1 * 2^(e - 127))
are uint8 [k/32, n], in each 64 columns permuted as Marlin's are: out[64 a + 8 i + j] = in[64 a + i + 8 j].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.layouts import marlin, mxfp4, native_pack
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

LAYOUT_ID = "marlin-e2m1-g32-e8m0"
LARGEST_SCALE = 192
"""The kernels' bf16 has no room for more: weights beyond 2^65."""

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class MarlinMxfp4Layout(ExpertPacker):
    """Experts of MXFP4 for the GPU; there is one such layout."""

    @property
    def layout_id(self) -> str:
        """The name a bundle stores."""
        return LAYOUT_ID

    @classmethod
    def from_id(cls, layout_id: str) -> MarlinMxfp4Layout | None:
        """The layout of its id; None for an id of others."""
        return cls() if layout_id == LAYOUT_ID else None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4

    @property
    def tier(self) -> ExpertTier:
        """The GPU's copy."""
        return "gpu"

    @property
    def backends(self) -> frozenset[ExpertTier]:
        """The GPU."""
        return frozenset({"gpu"})

    @property
    def tiles(self) -> None:
        """No CPU kernel reads them."""
        return None

    @property
    def scale_dtype(self) -> str:
        """Powers of two."""
        return "E8M0"

    @property
    def int8_tile(self) -> Int8Tile | None:
        """None: codes have 4 bits."""
        return None

    def group_of(self, k: int, where: str = "") -> int:
        """Always a block. Raises UnsupportedModelError unless it divides k."""
        if k % mxfp4.BLOCK_K:
            raise UnsupportedModelError(
                "a block of MXFP4 does not divide the input features",
                where=where or self.layout_id,
                got=k,
                limit=f"a multiple of {mxfp4.BLOCK_K}",
            )
        return mxfp4.BLOCK_K

    def fitted(self, sizes: Iterable[int]) -> MarlinMxfp4Layout:
        """This layout: there is no other. Raises UnsupportedModelError for sizes it does not fit."""
        for size in sizes:
            self.group_of(size)
        return self

    def accepts(self, dtype: str) -> Acceptance:
        """Blocks of MXFP4 are kept bit for bit; plain floats are rounded to such."""
        return "as is" if dtype == "MXFP4" else accepts_floats(dtype)

    def explained_error(self, k: int) -> float:
        """See ``Layout``."""
        return rounding_error(4, mxfp4.BLOCK_K)

    def strips(
        self, shape: tuple[int, ...], num_bytes: int, hidden: int, intermediate: int, gated: bool = True
    ) -> Iterator[Strips]:
        """Nothing: no CPU kernel reads them."""
        return iter(())

    def expert_record(self, hidden: int, intermediate: int, gated: bool = True) -> ExpertRecord:
        """Sections of one expert. Raises UnsupportedModelError for sizes that do not fit tiles."""
        check_expert_sizes(hidden, intermediate, self.layout_id)
        num, matrices = hidden * intermediate, 2 if gated else 1
        return lay_out(
            {
                "w13_codes": matrices * num // 2,
                "w13_scales": matrices * num // mxfp4.BLOCK_K,
                "w2_codes": num // 2,
                "w2_scales": num // mxfp4.BLOCK_K,
            },
            marlin.SECTION_ALIGNMENT_BYTES,
        )

    def views(
        self, record: Bytes, hidden: int, intermediate: int, gated: bool = True
    ) -> tuple[Words, Bytes, Words, Bytes]:
        """w13 codes [hidden/16, 4*intermediate] and scales [hidden/32, 2*intermediate], then w2's: views.
        Without a gate w13 has half as many.
        """
        spec = self.expert_record(hidden, intermediate, gated)
        check_record(record, spec, self.layout_id, writable=False)
        return (
            spec.w13_codes.of(record).view(np.uint32).reshape(hidden // 16, -1),
            spec.w13_scales.of(record).reshape(-1, (2 if gated else 1) * intermediate),
            spec.w2_codes.of(record).view(np.uint32).reshape(intermediate // 16, -1),
            spec.w2_scales.of(record).reshape(-1, hidden),
        )

    def pack_part(
        self,
        pool: Pool,
        part: Part,
        matrix: MatrixView,
        out: Bytes,
        *,
        hidden: int,
        intermediate: int,
        gated: bool = True,
        importance: npt.NDArray[np.float32] | None = None,
        where: str = "",
    ) -> PackStats:
        """Packs one matrix of an expert into its columns of the record ``out``; padding is left alone.

        importance is not used: scales are powers of two. Raises FormatError, naming the row, for weights that
        are not finite and scales above 192.
        """
        check_part(part, matrix, hidden, intermediate, where)
        check_record(out, self.expert_record(hidden, intermediate, gated), where, writable=True)
        lost = None
        if matrix.dtype != "MXFP4":
            matrix, lost = as_mxfp4(matrix, where)
        w13, w13_scales, w2, w2_scales = self.views(out, hidden, intermediate, gated)
        codes, scales = (w2, w2_scales) if part == "down" else (w13, w13_scales)
        packed = native_pack.pack_marlin_from_mxfp4(
            pool,
            matrix,
            codes,
            scales,
            n_offset=intermediate if gated and part == "up" else 0,
            largest_scale=LARGEST_SCALE,
            where=where,
        )
        return packed if lost is None else replace(lost, count=packed.count)

    def unpack_codes(
        self, record: Bytes, hidden: int, intermediate: int, gated: bool = True
    ) -> tuple[tuple[Bytes, Bytes], tuple[Bytes, Bytes], tuple[Bytes, Bytes]]:
        """(codes [n, k], scales [n, k/32]) of gate, up and down, exactly as stored."""
        w13, w13_scales, w2, w2_scales = self.views(record, hidden, intermediate, gated)
        both, down = (_unpacked(*one) for one in ((w13, w13_scales), (w2, w2_scales)))
        cuts = slice(-intermediate), slice(-intermediate, None)
        gate, up = ((both[0][cut], both[1][cut]) for cut in cuts)
        return gate, up, down

    def unpack_expert(
        self, record: Bytes, hidden: int, intermediate: int, gated: bool = True
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """gate, up [intermediate, hidden] and down [hidden, intermediate], dequantised."""
        parts = self.unpack_codes(record, hidden, intermediate, gated)
        gate, up, down = (mxfp4.dequantize(*part) for part in parts)
        return gate, up, down


def _unpacked(words: Words, scales: Bytes) -> tuple[Bytes, Bytes]:
    codes = marlin.unpack_codes(words, 4)
    plain = marlin.unpermute_scales(scales, codes.shape[0], mxfp4.BLOCK_K)
    return np.ascontiguousarray(codes.T), np.ascontiguousarray(plain.T)
