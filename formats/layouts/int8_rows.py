"""Dense weights for the CPU: int8 [n/32, k/4, 32 rows, 4 k] with one float32 scale a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.layouts import native_pack
from krasis.formats.layouts.expert_format import Int8Tile, Strips, rounding_error
from krasis.formats.layouts.matrix import MatrixView, PackStats
from krasis.formats.native import Pool

STRIP_ROWS = 32
K_MULTIPLE = 32


def padded_rows(num_rows: int) -> int:
    """num_rows rounded up to whole strips, as the vocabulary of a packed output head is."""
    return -(-num_rows // STRIP_ROWS) * STRIP_ROWS


def pack_codes(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Codes [n, k] as [n/32, k/4, 32, 4]."""
    if codes.ndim != 2 or codes.dtype != np.int8 or codes.shape[0] % STRIP_ROWS or codes.shape[1] % 4:
        raise FormatError(
            "codes must be int8 [n, k]", got=f"{codes.dtype} {codes.shape}", limit="n % 32, k % 4"
        )
    n, k = codes.shape
    return np.ascontiguousarray(codes.reshape(n // 32, 32, k // 4, 4).transpose(0, 2, 1, 3))


def unpack_codes(packed: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Inverse of ``pack_codes``."""
    if packed.ndim != 4 or packed.shape[2:] != (32, 4) or packed.dtype != np.int8:
        raise FormatError(
            "packed codes must be int8 [n/32, k/4, 32, 4]", got=f"{packed.dtype} {packed.shape}"
        )
    strips, words = packed.shape[:2]
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3)).reshape(strips * 32, words * 4)


@dataclass(frozen=True, slots=True)
class Int8RowsLayout:
    """One scale a row, absmax / 127; a row of zeros has scale 1."""

    @property
    def layout_id(self) -> str:
        """The name a bundle stores."""
        return "int8-rows-r32k4"

    @property
    def int8_tile(self) -> Int8Tile:
        """All bytes are codes: scales lie in a blob of their own."""
        return Int8Tile(STRIP_ROWS * 4, 0)

    def explained_error(self, k: int) -> float:
        """See ``Layout``."""
        return rounding_error(8, k)

    def strips(
        self, shape: tuple[int, ...], num_bytes: int, hidden: int, intermediate: int, gated: bool = True
    ) -> Iterator[Strips]:
        """The strips of codes; scales are read by all."""
        if len(shape) == 4:
            yield Strips(0, num_bytes, shape[0])

    def codes_shape(self, n: int, k: int) -> tuple[int, int, int, int]:
        """Shape of the codes of a weight [n, k]. Raises UnsupportedModelError unless 32 divides both."""
        if n <= 0 or k <= 0 or n % STRIP_ROWS or k % K_MULTIPLE:
            raise UnsupportedModelError(
                "weight does not divide into strips of 32 rows",
                where=self.layout_id,
                got=f"({n}, {k})",
                limit="n % 32, k % 32",
            )
        return (n // STRIP_ROWS, k // 4, STRIP_ROWS, 4)

    def pack(
        self,
        pool: Pool,
        matrix: MatrixView,
        codes: npt.NDArray[np.int8],
        scales: npt.NDArray[np.float32],
        *,
        where: str = "",
    ) -> PackStats:
        """Fills codes int8 [n/32, k/4, 32, 4] and scales float32 [n] from floats [n, k].

        Both may be parts of a larger array along their first axis: fused weights are packed part by part.
        Raises FormatError, naming the row, for weights that are not finite.
        """
        self.codes_shape(matrix.n, matrix.k)
        return native_pack.pack_int8_rows(pool, matrix, codes, scales, where=where)

    def unpack(self, codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The dequantised weight [n, k]."""
        return unpack_codes(codes).astype(np.float32) * scales[:, None]
