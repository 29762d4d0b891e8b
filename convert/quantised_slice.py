"""Rows of a weight that a checkpoint holds quantised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from krasis.convert.slices import FLOAT_BYTES, Bytes, Floats, TensorSlice
from krasis.formats.checkpoints.ggml_blocks import block_size
from krasis.formats.checkpoints.quantised.steps import fit_float16
from krasis.formats.checkpoints.quantised.weight import QuantisedWeight
from krasis.formats.errors import FormatError
from krasis.formats.layouts import mxfp4
from krasis.formats.layouts.matrix import MatrixView


@dataclass(frozen=True, slots=True)
class QuantisedSlice(TensorSlice):
    """As ``TensorSlice``; the bytes are those of the codes. weight: what these are rows of, from ``first``
    on, counted through all experts' matrices.

    ``plain`` and ``at_rows`` make other slices of it; ``dataclasses.replace`` does with a float type and the
    bytes of its elements. Other bytes under the same type are no weights, and are refused.

    Codes that do not lie row after row are in the slice that begins at the first row, all of them.
    """

    weight: QuantisedWeight
    first: int

    @property
    def is_float(self) -> bool:
        """Only once the weights were replaced."""
        return self.dtype in FLOAT_BYTES

    @property
    def row_bytes(self) -> int:
        """Bytes of codes a row."""
        return (
            self.raw.nbytes // self.shape[0] if self.is_float else self.total_bytes // num_rows(self.weight)
        )

    @property
    def block(self) -> tuple[int, int]:
        """(weights, bytes) of what cannot be divided in the codes."""
        return block_size(self.dtype, self.where) if self.is_float else self.weight.block

    def rows(self, start: int, stop: int) -> TensorSlice:
        """Rows ``start`` to ``stop`` (clipped to the last)."""
        if self.is_float:
            return TensorSlice.rows(self, start, stop)
        self._check_bytes()
        return quantised_slice(self.weight, self.where, self.first + start, min(stop, self.shape[0]) - start)

    def decode(self) -> Floats:
        """The weights as float32."""
        if self.is_float:
            return TensorSlice.decode(self)
        self._check_bytes()
        return self.weight.decode(self.first, self.shape[0])

    def matrix(self) -> MatrixView:
        """The slice for a packer, dequantised, with the scales of codes of 4 bits."""
        if self.is_float:
            return TensorSlice.matrix(self)
        self._check_bytes()
        rows = self.first, self.shape[0]
        if self.weight.step_scales(*rows) is None:
            return MatrixView(self.decode(), "F32")
        steps = self.weight.steps(*rows)
        return MatrixView(steps.values(), "F32", steps.scales if steps.fit_4_bits else None)

    def keeps(self, dtype: str) -> bool:
        """See ``TensorSlice``."""
        if self.is_float:
            return False
        if dtype == "MXFP4":
            return self.weight.pairs(self.first, 1) is not None
        scales = self.weight.step_scales(self.first, self.shape[0])
        return scales is not None and fit_float16(scales)

    def blocks(self, dtype: str) -> MatrixView:
        """The weights as blocks of a type that ``keeps`` them."""
        self._check_bytes()
        rows = self.first, self.shape[0]
        if dtype == "MXFP4" and (pairs := self.weight.pairs(*rows)) is not None:
            return MatrixView(mxfp4.blocks_of_pairs(*pairs), dtype)
        return MatrixView(self.weight.steps(*rows).q8_0(), "Q8_0")

    def at_rows(self, places: npt.NDArray[np.int64]) -> TensorSlice:
        """The rows at these places, in their order and in float32."""
        values = self.decode()[places]
        return replace(self.plain(values), shape=values.shape)

    def plain(self, values: Floats) -> TensorSlice:
        """The same rows with other weights, in float32."""
        return replace(TensorSlice.plain(self, values), offset_bytes=self.first * self.row_bytes)

    def is_zero(self, block: int) -> bool:
        """Whether the first weight of a block of the bytes is 0."""
        row, column = self.weight.locate(self.offset_bytes // self.block[1] + block)
        return not self.weight.decode(row, 1)[0, column]

    def _check_bytes(self) -> None:
        """Raises FormatError for bytes that are not those of the weight: its scales would be others'."""
        expected = quantised_slice(self.weight, self.where, self.first, self.shape[0]).raw
        if self.raw.nbytes != expected.nbytes or self.raw.ctypes.data != expected.ctypes.data:
            raise FormatError(
                "codes of a quantised weight were taken apart from their scales", where=self.where
            )

    def companions(self) -> Iterator[tuple[str, Bytes]]:
        """Names and bytes of the other tensors that the weights are made of."""
        for part in self.weight.others:
            yield part.name, part.bytes()


def num_rows(weight: QuantisedWeight) -> int:
    """Rows of all matrices."""
    return math.prod(weight.shape[:-1])


def quantised_slice(weight: QuantisedWeight, where: str, first: int, count: int) -> QuantisedSlice:
    """``count`` rows from ``first`` on."""
    raw = weight.codes.bytes()
    total, begin, end = raw.nbytes, 0, raw.nbytes
    if weight.by_rows:
        row_bytes = total // num_rows(weight)
        begin, end = first * row_bytes, (first + count) * row_bytes
    elif first:
        begin = total
    return QuantisedSlice(
        tensor=weight.codes.name,
        where=where,
        dtype=weight.dtype,
        shape=(count, weight.shape[-1]),
        raw=raw[begin:end],
        offset_bytes=begin,
        total_bytes=total,
        weight=weight,
        first=first,
    )
