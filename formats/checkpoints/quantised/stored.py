"""A tensor of a checkpoint that is a part of a quantised weight, and its numbers as float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.dtypes import NUMPY_DTYPES
from krasis.formats.errors import FormatError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


def _e4m3() -> Floats:
    """The value of every byte as a float of 4 exponent and 3 mantissa bits, without infinities."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[code & 127 == 127] = np.nan
    return np.where(code >= 128, -size, size).astype(np.float32)


def _e8m0() -> Floats:
    """The value of every byte as a power of two."""
    values = 2.0 ** (np.arange(256) - 127.0)
    values[255] = np.nan
    return values.astype(np.float32)


E4M3 = _e4m3()
E8M0 = _e8m0()
# A byte without a type of its own is an exponent: nobody keeps scales as whole numbers.
_TABLES = {"F8_E4M3": E4M3, "F8_E8M0": E8M0, "U8": E8M0}
SCALE_DTYPES = ("F32", "BF16", "F16", *_TABLES)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor. where: file and tensor, for messages. view: its bytes, mapped when asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    where: str
    view: Callable[[str], Bytes]

    def bytes(self) -> Bytes:
        """uint8 [num_bytes], a view of the mapped file."""
        return self.view(self.name)

    def array(self, dtype: str | None = None) -> Array:
        """Its elements, flat, as NumPy has them; a view."""
        return self.bytes().view(NUMPY_DTYPES[dtype or self.dtype])

    def check_dtype(self, *dtypes: str) -> None:
        """Raises FormatError unless the type is one of these."""
        if self.dtype not in dtypes:
            raise FormatError(
                "a part of a quantised weight has an unexpected type",
                where=self.where,
                got=self.dtype,
                limit=", ".join(dtypes),
            )

    def wrong_shape(self, limit: str) -> FormatError:
        """The error for a shape that does not fit the weight's other parts."""
        return FormatError(
            "a part of a quantised weight does not fit its other parts",
            where=self.where,
            got=list(self.shape),
            limit=limit,
        )


def scale_values(values: Array, stored: Stored) -> Floats:
    """Scales that were taken out of ``stored`` as they lie there, as float32.

    Raises FormatError for NaN and infinity: a weight multiplied by those is none.
    """
    table = _TABLES.get(stored.dtype)
    if table is not None:
        floats = table[values.view(np.uint8)]
    elif stored.dtype == "BF16":
        floats = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        floats = values.astype(np.float32)
    if not np.isfinite(floats).all():
        raise FormatError("NaN or infinity among the scales of a quantised weight", where=stored.where)
    return floats


def scale_array(stored: Stored) -> Array:
    """Scales as they lie in the file, flat, for ``scale_values``."""
    return stored.array("U8" if stored.dtype in _TABLES else None)
