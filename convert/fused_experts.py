"""Matrices of one expert out of tensors that hold them in another order, as if these held none so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from krasis.convert.slices import Bytes, TensorSlice
from krasis.convert.source_names import ExpertPlace

Take = Callable[[str, tuple[int, ...], int], TensorSlice]
"""Rows of a tensor: its name, their shape, the first of them."""


def transposed(take: Take, place: ExpertPlace, rows: int, columns: int) -> TensorSlice:
    """A matrix [rows, columns] that the tensor holds as [columns, rows]; of a quantised one in float32."""
    first = place.first_matrix // place.matrices * columns
    held = take(place.tensor, (columns, place.matrices * rows), first)
    return _matrix(held, _values(held)[:, place.taken(rows)].T, place)


def interleaved(take: Take, place: ExpertPlace, rows: int, columns: int) -> TensorSlice:
    """A matrix whose rows take turns with another's; of a quantised one in float32."""
    first = place.first_matrix // place.matrices * place.matrices * rows
    held = take(place.tensor, (place.matrices * rows, columns), first)
    return _matrix(held, _values(held)[place.taken(rows)], place)


def made(
    held: Bytes, dtype: str, num_experts: int, where: str, place: ExpertPlace, shape: tuple[int, int]
) -> TensorSlice:
    """A matrix of this shape out of the bytes of all its expert's, which are of dtype."""
    rows = held.reshape(place.matrices * shape[0], -1)[place.taken(shape[0])]
    raw = np.ascontiguousarray(rows).reshape(-1)
    total_bytes = num_experts * place.matrices * raw.nbytes
    return TensorSlice(place.tensor, where, dtype, shape, raw, place.first_matrix * raw.nbytes, total_bytes)


def _values(held: TensorSlice) -> npt.NDArray[np.generic]:
    return held.floats() if held.is_float else held.decode()


def _matrix(held: TensorSlice, values: npt.NDArray[np.generic], place: ExpertPlace) -> TensorSlice:
    num_experts = held.total_bytes // held.raw.nbytes
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return TensorSlice(
        tensor=place.tensor,
        where=held.where,
        dtype=held.dtype if held.is_float else "F32",
        shape=(values.shape[0], values.shape[1]),
        raw=raw,
        offset_bytes=place.first_matrix * raw.nbytes,
        total_bytes=num_experts * place.matrices * raw.nbytes,
    )
