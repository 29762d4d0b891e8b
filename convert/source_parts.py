"""A source's tensor as a model has it: names, and the order of rows, differ between kinds of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from krasis.convert.slices import FLOAT_BYTES, TensorSlice
from krasis.formats.errors import FormatError
from krasis.formats.models.family import Transform
from krasis.formats.models.picks import Pick

# Of the transforms that take every other column, the first.
COLUMNS: dict[str, int] = {"even_columns": 0, "odd_columns": 1}


@dataclass(frozen=True, slots=True)
class SourcePart:
    """What goes into a dense blob as one piece: a tensor of the source, and what is done to it.

    ``undo_rope_permutation``: the rows of each head, of head_rows rows, go back from pairs (0, n/2), (1,
    n/2 + 1), ... to their order. ``add_one``: 1 is added to each weight. ``even_columns``,
    ``odd_columns``: of each row these alone, of which the piece has twice as many.
    """

    piece: TensorSlice
    transform: Transform = "none"
    head_rows: int = 1
    pick: Pick | None = None

    @property
    def dtype(self) -> str:
        """The type that keeps it as it is: its own float type, else F32."""
        return "F32" if self._computes else plain_dtype(self.piece.dtype)

    @property
    def num_rows(self) -> int:
        """Rows that the model has of it."""
        if self.pick is not None and self.pick.axis == 0:
            return len(self.pick.places)
        return self.piece.shape[0]

    @property
    def _picks_rows(self) -> bool:
        return self.pick is not None and self.pick.axis == 0

    @property
    def _computes(self) -> bool:
        return self.transform in ("add_one", "log_of_negative")

    def blocks(self, max_rows: int, multiple: int = 1) -> Iterator[TensorSlice]:
        """All of it as the file has it, in order: blocks of at most max_rows rows or the least that there
        can be, each but the last a multiple of ``multiple`` rows. One block where rows are picked.
        """
        if self._picks_rows:
            return iter((self.piece,))
        multiple = math.lcm(multiple, self.head_rows)
        step = max(1, max_rows // multiple) * multiple
        rows = self.piece.shape[0]
        return (self.piece.rows(start, start + step) for start in range(0, rows, step))

    def restored(self, block: TensorSlice) -> TensorSlice:
        """A block of ``blocks`` as the model has it."""
        if self.pick is not None and self._picks_rows:
            block = block.at_rows(self.pick.places)
        return self._computed(self._ordered(block))

    def _ordered(self, block: TensorSlice) -> TensorSlice:
        if self.pick is not None and not self._picks_rows:
            return _columns_at(block, self.pick)
        if self.transform == "undo_rope_permutation":
            return block.at_rows(self._order(block.shape[0]))
        if self.transform in COLUMNS:
            rows = block.floats()[:, COLUMNS[self.transform] :: 2]
            raw = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
            return replace(block, shape=rows.shape, raw=raw)
        return block

    def _computed(self, block: TensorSlice) -> TensorSlice:
        if not self._computes:
            return block
        values = block.decode()
        if self.transform == "add_one":
            values = values + np.float32(1)
        else:
            if not (values < 0).all():  # a NaN too
                raise FormatError("decay rates are negative", where=block.where, got=float(values.max()))
            values = np.log(-values)
        return block.plain(values)

    def row(self, index: int) -> TensorSlice:
        """One row of the model's matrix."""
        place = index
        if self.pick is not None and self._picks_rows:
            place = int(self.pick.places[index])
        elif self.transform == "undo_rope_permutation":
            first = index - index % self.head_rows
            place = first + int(self._order(self.head_rows)[index - first])
        row = self.piece.rows(place, place + 1)
        if self.transform == "undo_rope_permutation":
            return row
        return self._computed(row if self._picks_rows else self._ordered(row))

    def _order(self, num_rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """For each row of whole heads, where the file has it."""
        row = np.arange(num_rows)
        head, half = self.head_rows, self.head_rows // 2
        return row - row % head + row % half * 2 + row % head // half


def plain_dtype(dtype: str) -> str:
    """The type a plain blob keeps: its own, or F32 (exact) for a quantised source."""
    return dtype if dtype in FLOAT_BYTES else "F32"


def stacked_dtype(parts: list[SourcePart]) -> str:
    """The type of a plain blob made of these: theirs if they have one, else F32."""
    dtypes = {part.dtype for part in parts}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _columns_at(block: TensorSlice, pick: Pick) -> TensorSlice:
    """Rows with their columns in the model's order; in float32 where the file's are quantised in blocks."""
    if block.is_float:
        return replace(block, raw=block.floats()[:, pick.places].reshape(-1).view(np.uint8))
    return block.plain(block.decode()[:, pick.places])
