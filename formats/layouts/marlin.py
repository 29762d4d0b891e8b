"""Weights for the Marlin GPU kernel: 16x64 tiles whose words are the kernel's register fragments.

Weight (k, n) lies in row k/16; with r = k % 16, c = n % 16, j = (n%64)/16 and lane = (c%8)*4 + (r%8)/2:

- 4 bits, code q + 8: uint32 [K/16, 2N], column (n/64)*128 + lane*4 + j, nibble 2*(c/8) + r/8 + 4*(r%2);
- 8 bits, code q + 128: uint32 [K/16, 4N], column (n/64)*256 + lane*8 + 2*j + c/8, byte r/8 + 2*(r%2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.layouts import native_pack
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
from krasis.formats.layouts.matrix import MatrixView, PackStats, bf16_to_float32
from krasis.formats.native import Pool

BITS = (4, 8)
GROUPS = (32, 64, 128)
SCALE_DTYPES = ("BF16", "F16")
SECTION_ALIGNMENT_BYTES = 256
TILE_K, TILE_N = 16, 64

_LAYOUT_ID = re.compile(r"marlin-(u4b8|u8b128)-g(32|64|128|channel)-(bf16|f16)")

Array = npt.NDArray[Any]


def _check_codes(codes: Array) -> None:
    if codes.ndim != 2 or codes.dtype != np.uint8 or codes.shape[0] % TILE_K or codes.shape[1] % TILE_N:
        raise FormatError(
            "Marlin codes must be uint8 [k, n]", got=f"{codes.dtype} {codes.shape}", limit="k % 16, n % 64"
        )


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Biased codes [k, n], one a byte, as Marlin words [k/16, n*bits/2]."""
    _check_codes(codes)
    k, n = codes.shape
    # k = (k_tile, r/8, r%8/2, r%2), n = (n_tile, n%64/16, c/8, c%8)
    split = codes.reshape(k // 16, 2, 4, 2, n // 64, 4, 2, 8).astype(np.uint32)
    if bits == 4:
        fields = split.transpose(0, 4, 7, 2, 5, 3, 6, 1).reshape(k // 16, 2 * n, 8)
    else:
        fields = split.transpose(0, 4, 7, 2, 5, 6, 3, 1).reshape(k // 16, 4 * n, 4)
    words = np.zeros(fields.shape[:2], np.uint32)
    for i in range(fields.shape[2]):
        words |= fields[:, :, i] << np.uint32(bits * i)
    return words


def unpack_codes(words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """Inverse of ``pack_codes``."""
    if words.ndim != 2 or words.dtype != np.uint32 or words.shape[1] % (TILE_N * bits // 2):
        raise FormatError("Marlin words must be uint32 [k/16, n*bits/2]", got=f"{words.dtype} {words.shape}")
    k, n = words.shape[0] * 16, words.shape[1] * 2 // bits
    fields = np.empty((*words.shape, 32 // bits), np.uint8)
    for i in range(fields.shape[2]):
        fields[:, :, i] = (words >> np.uint32(bits * i)) & np.uint32(2**bits - 1)
    if bits == 4:
        split = fields.reshape(k // 16, n // 64, 8, 4, 4, 2, 2, 2).transpose(0, 7, 3, 5, 1, 4, 6, 2)
    else:
        split = fields.reshape(k // 16, n // 64, 8, 4, 4, 2, 2, 2).transpose(0, 7, 3, 6, 1, 4, 5, 2)
    return np.ascontiguousarray(split).reshape(k, n)


def permute_scales(scales: Array, k: int, group: int) -> Array:
    """Scales [k/group, n] in the order the kernel reads them; another when there is one a channel."""
    groups, n = scales.shape
    if group < k:  # out[64a + 8i + j] = in[64a + i + 8j]
        return np.ascontiguousarray(scales.reshape(groups, n // 64, 8, 8).transpose(0, 1, 3, 2)).reshape(
            groups, n
        )
    # out[32a + 8i + 2b + e] = in[32a + 8b + 2i + e]
    return np.ascontiguousarray(scales.reshape(groups, n // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)).reshape(
        groups, n
    )


def unpermute_scales(scales: Array, k: int, group: int) -> Array:
    """Inverse of ``permute_scales``: both permutations are their own inverse."""
    return permute_scales(scales, k, group)


@dataclass(frozen=True, slots=True)
class MarlinLayout(ExpertPacker):
    """Experts for the GPU. bits: 4 or 8. group: 32, 64 or 128 input features a scale; None: one a channel.

    scale_dtype: ``BF16`` or ``F16``, the type the kernel computes in. Others raise UnsupportedModelError.
    """

    bits: int = 4
    group: int | None = 128
    scale_dtype: str = "BF16"

    def __post_init__(self) -> None:
        known_group = self.group is None or self.group in GROUPS
        if self.bits not in BITS or not known_group or self.scale_dtype not in SCALE_DTYPES:
            raise UnsupportedModelError(
                "no such Marlin layout",
                got=f"{self.bits} bits, group {self.group}, {self.scale_dtype}",
                limit="4 or 8 bits, group 32, 64, 128 or one scale a channel, BF16 or F16",
            )

    @property
    def layout_id(self) -> str:
        """The name a bundle stores, such as ``marlin-u4b8-g128-bf16``."""
        code = "u4b8" if self.bits == 4 else "u8b128"
        return f"marlin-{code}-g{self.group or 'channel'}-{self.scale_dtype.lower()}"

    @classmethod
    def from_id(cls, layout_id: str) -> MarlinLayout | None:
        """The layout of a layout id; None for an id of others."""
        match = _LAYOUT_ID.fullmatch(layout_id)
        if match is None:
            return None
        code, group, dtype = match.groups()
        return cls(4 if code == "u4b8" else 8, None if group == "channel" else int(group), dtype.upper())

    @property
    def tier(self) -> ExpertTier:
        """The GPU's copy."""
        return "gpu"

    @property
    def backends(self) -> frozenset[ExpertTier]:
        """The GPU, for 4 bits; there are no kernels for 8."""
        return frozenset({"gpu"}) if self.bits == 4 else frozenset()

    @property
    def tiles(self) -> None:
        """No CPU kernel reads them."""
        return None

    @property
    def int8_tile(self) -> Int8Tile | None:
        """None: codes are biased, and any byte may be one."""
        return None

    def accepts(self, dtype: str) -> Acceptance:
        """Plain floats are packed as they are."""
        return accepts_floats(dtype)

    def explained_error(self, k: int) -> float:
        """See ``Layout``."""
        return rounding_error(self.bits, self.group or k)

    def strips(
        self, shape: tuple[int, ...], num_bytes: int, hidden: int, intermediate: int, gated: bool = True
    ) -> Iterator[Strips]:
        """Nothing: no CPU kernel reads them."""
        return iter(())

    def fitted(self, sizes: Iterable[int]) -> MarlinLayout:
        """The largest group, not above this one's, that divides all sizes.

        Raises UnsupportedModelError, naming a size, if none does.
        """
        if self.group is None:
            return self
        sizes = tuple(sizes)
        for group in sorted((one for one in GROUPS if one <= self.group), reverse=True):
            if not any(size % group for size in sizes):
                return replace(self, group=group)
        raise UnsupportedModelError(
            "no scale group divides the input features of the experts",
            where=self.layout_id,
            got=next(size for size in sizes if size % min(GROUPS)),
            limit=f"a multiple of {min(GROUPS)}",
        )

    def group_of(self, k: int, where: str = "") -> int:
        """Input features a scale, for k of them. Raises UnsupportedModelError unless the group divides k."""
        group = self.group or k
        if k % group:
            raise UnsupportedModelError(
                "the scale group does not divide the input features",
                where=where or self.layout_id,
                got=f"group {group}, {k} features",
                hint="choose a smaller group, or one scale a channel",
            )
        return group

    def expert_record(self, hidden: int, intermediate: int, gated: bool = True) -> ExpertRecord:
        """Sections of one expert. Raises UnsupportedModelError for sizes that do not fit tiles or groups."""
        check_expert_sizes(hidden, intermediate, self.layout_id)
        w13_rows = (2 if gated else 1) * intermediate
        return lay_out(
            {
                "w13_codes": w13_rows * hidden * self.bits // 8,
                "w13_scales": hidden // self.group_of(hidden) * w13_rows * 2,
                "w2_codes": intermediate * hidden * self.bits // 8,
                "w2_scales": intermediate // self.group_of(intermediate) * hidden * 2,
            },
            SECTION_ALIGNMENT_BYTES,
        )

    def views(
        self, record: npt.NDArray[np.uint8], hidden: int, intermediate: int, gated: bool = True
    ) -> tuple[
        npt.NDArray[np.uint32], npt.NDArray[np.uint16], npt.NDArray[np.uint32], npt.NDArray[np.uint16]
    ]:
        """w13 codes [hidden/16, intermediate*bits] and scales [groups, 2*intermediate], then w2's: views.
        Without a gate w13 has half as many.
        """
        spec = self.expert_record(hidden, intermediate, gated)
        check_record(record, spec, self.layout_id, writable=False)
        return (
            spec.w13_codes.of(record).view(np.uint32).reshape(hidden // 16, -1),
            spec.w13_scales.of(record).view(np.uint16).reshape(-1, (2 if gated else 1) * intermediate),
            spec.w2_codes.of(record).view(np.uint32).reshape(intermediate // 16, -1),
            spec.w2_scales.of(record).view(np.uint16).reshape(-1, hidden),
        )

    def dequantize(
        self, words: npt.NDArray[np.uint32], scales: npt.NDArray[np.uint16]
    ) -> npt.NDArray[np.float32]:
        """Packed words [k/16, n*bits/2] and permuted scales [k/group, n] as weights [k, n]."""
        codes = unpack_codes(words, self.bits)
        k, n = codes.shape
        group = k // scales.shape[0]
        plain = unpermute_scales(scales, k, group)
        values = (
            bf16_to_float32(plain)
            if self.scale_dtype == "BF16"
            else plain.view(np.float16).astype(np.float32)
        )
        centred = codes.astype(np.float32) - np.float32(2 ** (self.bits - 1))
        return (centred.reshape(-1, group, n) * values[:, None, :]).reshape(k, n)

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
        """Packs one matrix of an expert into its columns of the record ``out``; padding is left alone."""
        check_part(part, matrix, hidden, intermediate, where)
        check_record(out, self.expert_record(hidden, intermediate, gated), where, writable=True)
        w13, w13_scales, w2, w2_scales = self.views(out, hidden, intermediate, gated)
        codes, scales = (w2, w2_scales) if part == "down" else (w13, w13_scales)
        return native_pack.pack_marlin(
            pool,
            matrix,
            codes,
            scales,
            bits=self.bits,
            group=self.group_of(matrix.k),
            scale_dtype=self.scale_dtype,
            n_offset=intermediate if gated and part == "up" else 0,
            importance=importance,
            where=where,
        )

    def unpack_expert(
        self, record: npt.NDArray[np.uint8], hidden: int, intermediate: int, gated: bool = True
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """gate, up [intermediate, hidden] and down [hidden, intermediate], dequantised."""
        w13, w13_scales, w2, w2_scales = self.views(record, hidden, intermediate, gated)
        fused = np.ascontiguousarray(self.dequantize(w13, w13_scales).T)
        down = np.ascontiguousarray(self.dequantize(w2, w2_scales).T)
        return fused[:-intermediate], fused[-intermediate:], down
