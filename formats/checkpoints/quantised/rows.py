"""Quantised weights whose codes lie row after row: FP8, INT8, and several codes in a byte (INT4, FP4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from krasis.formats.checkpoints.quantised.steps import BLOCK, Steps
from krasis.formats.checkpoints.quantised.stored import (
    E4M3,
    SCALE_DTYPES,
    Array,
    Bytes,
    Floats,
    Stored,
    scale_array,
    scale_values,
)
from krasis.formats.errors import FormatError

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _of_bits(values: Floats, bits: int) -> Floats:
    """For each byte its codes' values, the lowest bits' first: [256, 8 / bits]."""
    shifts = np.arange(0, 8, bits)
    table: Floats = values[np.arange(256)[:, None] >> shifts & ((1 << bits) - 1)]
    return table


def _unsigned(bits: int) -> Floats:
    """Integer codes stored with half their range added."""
    return np.arange(1 << bits, dtype=np.float32) - np.float32(1 << bits - 1)


FP8_TABLE = E4M3[:, None]
INT8_TABLE = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)[:, None]
FP4_TABLE = _of_bits(np.concatenate([_E2M1, -_E2M1]), 4)
PACKED_TABLES = {bits: _of_bits(_unsigned(bits), bits) for bits in (2, 4, 8)}


@dataclass(frozen=True, slots=True)
class Grid:
    """Numbers that each belong to ``rows`` x ``columns`` weights of a matrix [n, k], the last ones cut.

    stored: [.., ceil(n / rows), ceil(k / columns)], or as many numbers in another shape.
    """

    stored: Stored
    rows: int
    columns: int
    n: int
    k: int

    @property
    def width(self) -> int:
        """Numbers beside each other."""
        return -(-self.k // self.columns)

    def of_rows(self, matrix: Array, row: Array) -> Array:
        """[len(row), width] as they lie in the file, for rows of the matrices of these numbers."""
        flat = scale_array(self.stored).reshape(-1, self.width)
        chosen: Array = flat[matrix * -(-self.n // self.rows) + row // self.rows]
        return chosen


@dataclass(frozen=True, slots=True)
class ZeroPoints:
    """Zero points, one a number of ``grid``; if ``bits`` is set, packed along the rows into 32-bit words."""

    grid: Grid
    bits: int | None

    def of_rows(self, matrix: Array, row: Array) -> Floats:
        """float32 [len(row), width]."""
        stored, width = self.grid.stored, self.grid.width
        if self.bits is None:
            return self.grid.of_rows(matrix, row).view(np.int8).astype(np.float32)
        per_word = 32 // self.bits
        words = stored.array("U32").reshape(-1, width)
        num_rows = -(-self.grid.n // per_word)
        shifts = (row % per_word * self.bits).astype(np.uint32)[:, None]
        codes = words[matrix * num_rows + row // per_word] >> shifts & np.uint32((1 << self.bits) - 1)
        values: Floats = codes.astype(np.float32) - np.float32(1 << self.bits - 1)
        return values


@dataclass(frozen=True, slots=True)
class RowsWeight:
    """See ``QuantisedWeight``. Weights are ``(code - zero) * scale * factor``, ``/ factor`` if ``divides``.

    table: [256, weights a byte], the values of a byte's codes. group_of_column: [k], which scale of its row a
    column has, where that is not their order. factor: one number, or one for each matrix. told_shape: what
    the file says that ``shape`` is.
    """

    dtype: str
    shape: tuple[int, ...]
    codes: Stored
    table: Floats
    scales: Grid
    zeros: ZeroPoints | None = None
    group_of_column: Stored | None = None
    factor: Stored | None = None
    divides: bool = False
    told_shape: Stored | None = None
    by_rows: bool = True

    @property
    def others(self) -> tuple[Stored, ...]:
        """The tensors beside the codes."""
        zeros = None if self.zeros is None else self.zeros.grid.stored
        parts = (self.scales.stored, zeros, self.group_of_column, self.factor, self.told_shape)
        return tuple(part for part in parts if part is not None)

    @property
    def block(self) -> tuple[int, int]:
        """(weights, bytes): a byte, or a word where codes are packed into words."""
        num_bytes = 4 if self.codes.dtype == "I32" else 1
        return num_bytes * self.table.shape[1], num_bytes

    def locate(self, block: int) -> tuple[int, int]:
        """(row, column) of the first weight of a block."""
        weights, num_bytes = self.block
        row, place = divmod(block, self._row_bytes() // num_bytes)
        return row, min(place * weights, self.shape[-1] - 1)

    def decode(self, first: int, count: int) -> Floats:
        """float32 [count, k]; see ``QuantisedWeight``."""
        matrix, row = self._rows(first, count)
        values = self._values(self.table, first, count)
        scales = scale_values(self.scales.of_rows(matrix, row), self.scales.stored)
        with np.errstate(all="ignore"):  # what overflows is told with the weight's name by whoever packs it
            if self.factor is not None:
                scales = self._with_factor(scales, matrix, self.factor)
            if self.zeros is not None:
                values = values - self._spread(self.zeros.of_rows(matrix, row))
            return np.ascontiguousarray(values * self._spread(scales))

    @property
    def symmetric_group(self) -> int | None:
        """See ``QuantisedWeight``."""
        plain = self.dtype == "int4" and self.zeros is None and self.group_of_column is None
        return min(self.scales.columns, self.shape[-1]) if plain else None

    def step_scales(self, first: int, count: int) -> Floats | None:
        """See ``QuantisedWeight``. Codes of 8 bits are left out: they may be -128, or less a zero point."""
        k, columns = self.shape[-1], self.scales.columns
        if self.dtype not in ("int2", "int4", "mxfp4") or k % BLOCK or not self._is_in_order():
            return None
        return self._step_scales(first, count) if columns >= k or columns % BLOCK == 0 else None

    def _is_in_order(self) -> bool:
        """Whether columns are of the groups that they would be of without a list."""
        if self.group_of_column is None:
            return True
        in_order = np.arange(self.shape[-1]) // self.scales.columns
        return np.array_equal(group_of_column(self.group_of_column, self.scales.width), in_order)

    def pairs(self, first: int, count: int) -> tuple[Bytes, Bytes] | None:
        """See ``QuantisedWeight``."""
        if self.dtype != "mxfp4":
            return None
        scales = self.scales.of_rows(*self._rows(first, count)).view(np.uint8)
        scale_values(scales, self.scales.stored)
        raw = self.codes.bytes().reshape(-1, self._row_bytes())[first : first + count]
        return raw.reshape(count, -1, BLOCK // 2), scales

    def steps(self, first: int, count: int) -> Steps:
        """See ``QuantisedWeight``."""
        k, columns = self.shape[-1], min(self.scales.columns, self.shape[-1])
        values = self._values(self.table * np.float32(1 / self._step), first, count)
        if self.zeros is not None:
            values = values - self._spread(self.zeros.of_rows(*self._rows(first, count)))
        scales = np.repeat(self._step_scales(first, count), columns // BLOCK, axis=1)
        return Steps(values.astype(np.int8), scales[:, : k // BLOCK])

    @property
    def _step(self) -> float:
        """What codes are multiples of: FP4 has halves."""
        return 0.5 if self.dtype == "mxfp4" else 1.0

    def _step_scales(self, first: int, count: int) -> Floats:
        scales = scale_values(self.scales.of_rows(*self._rows(first, count)), self.scales.stored)
        return scales * np.float32(self._step)

    def _rows(self, first: int, count: int) -> tuple[Array, Array]:
        """(matrix, row in it) of each row."""
        matrix, row = np.divmod(np.arange(first, first + count), self.shape[-2])
        return matrix, row

    def _values(self, table: Floats, first: int, count: int) -> Floats:
        """float32 [count, k]: the codes' values, without scales."""
        if self.told_shape is not None:
            _check_told(self.told_shape, self.shape)
        raw = self.codes.bytes().reshape(-1, self._row_bytes())[first : first + count]
        return np.take(table, raw, axis=0).reshape(count, -1)[:, : self.shape[-1]]

    def _with_factor(self, scales: Floats, matrix: Array, stored: Stored) -> Floats:
        factors = scale_values(scale_array(stored), stored)
        if self.divides and not factors.all():
            raise FormatError("a scale that others are divided by is 0", where=stored.where)
        factor = factors[matrix, None] if factors.size > 1 else factors
        return scales / factor if self.divides else scales * factor

    def _row_bytes(self) -> int:
        return self.codes.bytes().nbytes // math.prod(self.shape[:-1])

    def _spread(self, numbers: Floats) -> Floats:
        """One number for each column, [count, k] or [count, 1]."""
        k, columns = self.shape[-1], self.scales.columns
        if self.group_of_column is not None:
            return numbers[:, group_of_column(self.group_of_column, numbers.shape[1])]
        return numbers if columns >= k else np.repeat(numbers, columns, axis=1)[:, :k]


def _check_told(stored: Stored, shape: tuple[int, ...]) -> None:
    told = stored.array().tolist()
    if tuple(told) != shape:
        raise FormatError(
            "the shape of a quantised weight is not the one beside it",
            where=stored.where,
            got=told,
            limit=list(shape),
        )


def group_of_column(stored: Stored, num_groups: int) -> Array:
    """[k] int64: each input feature's group. Raises FormatError for one that is not there."""
    groups: Array = stored.array().astype(np.int64)
    if groups.size and not 0 <= groups.min() <= groups.max() < num_groups:
        wrong = int(groups[(groups < 0) | (groups >= num_groups)][0])
        raise FormatError(
            "an input feature of a quantised weight is of a group that has no scale",
            where=stored.where,
            got=wrong,
            limit=f"0..{num_groups - 1}",
        )
    return groups


def fit_grid(stored: Stored, shape: tuple[int, ...], blocks: tuple[tuple[int, int], ...]) -> Grid:
    """How scales lie over weights of ``shape``: one for all, one a row, or one a block of ``blocks`` (rows,
    columns). Raises FormatError if their number fits none of these.
    """
    stored.check_dtype(*SCALE_DTYPES)
    n, k = shape[-2:]
    found = stored.shape
    if len(found) == 2 * len(shape) and found[1::2] == (1,) * len(shape):
        found = found[::2]  # [n / rows, 1, k / columns, 1]
    matrices = math.prod(shape[:-2])
    if math.prod(found) == matrices:
        return Grid(stored, n, k, n, k)
    lead = shape[:-2]
    if found in ((*lead, n), (*lead, n, 1)):
        return Grid(stored, 1, k, n, k)
    for rows, columns in blocks:
        if found == (*lead, -(-n // rows), -(-k // columns)):
            return Grid(stored, rows, columns, n, k)
    sizes = " or ".join(str([*lead, -(-n // rows), -(-k // columns)]) for rows, columns in (*blocks, (1, k)))
    raise stored.wrong_shape(f"{sizes} for weights {list(shape)}")
