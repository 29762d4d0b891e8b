"""What the weights of a conversion are stored as, for notices."""

from __future__ import annotations

from collections.abc import Iterable

from krasis.convert.slices import FLOAT_BYTES
from krasis.convert.sources import WeightSource


def quantised_types(types: Iterable[str]) -> list[str]:
    """The types that lose precision against BF16 weights."""
    return [name for name in types if name not in FLOAT_BYTES]


def dense_types(source: WeightSource) -> list[str]:
    """The types of all dense tensors, sorted."""
    return sorted({part.piece.dtype for _, _, parts in source.all_dense() for part in parts})
