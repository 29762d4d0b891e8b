"""Tables of expert numbers by token id: whole numbers, which are checked and kept as int32."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.convert.slices import TensorSlice
from krasis.formats.errors import FormatError

TABLE = "experts.router.table"
_TYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


def check_ids_type(dtype: str, where: str) -> None:
    """Raises FormatError for a table whose elements are no whole numbers of 4 or 8 bytes."""
    if dtype not in _TYPES:
        raise FormatError(
            "a table of experts holds no whole numbers", where=where, got=dtype, limit=", ".join(_TYPES)
        )


def expert_numbers(block: TensorSlice, num_experts: int) -> npt.NDArray[np.uint8]:
    """The bytes of a block of rows as int32. Raises FormatError for a number of no expert, or one that a row
    has twice: a token's experts are different ones.
    """
    numbers = block.raw.view(_TYPES[block.dtype]).reshape(block.shape)
    wrong = (numbers < 0) | (numbers >= num_experts)
    if wrong.any():
        raise FormatError(
            "a table names an expert that the layer does not have",
            where=block.where,
            got=int(numbers[wrong][0]),
            limit=f"0..{num_experts - 1}",
        )
    ordered = np.sort(numbers, axis=1)
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        raise FormatError(
            "a table gives a token the same expert twice",
            where=block.where,
            got=f"expert {int(ordered[:, 1:][twice][0])}",
        )
    return numbers.astype("<i4").reshape(-1).view(np.uint8)
