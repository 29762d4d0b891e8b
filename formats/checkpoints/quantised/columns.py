"""Quantised weights that lie input feature after input feature, codes packed into 32-bit words: GPTQ, AWQ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from krasis.formats.checkpoints.quantised.rows import group_of_column
from krasis.formats.checkpoints.quantised.steps import BLOCK, Steps
from krasis.formats.checkpoints.quantised.stored import Array, Floats, Stored, scale_array, scale_values

_IN_ORDER = tuple(range(32))
# Which column of its eight each nibble of a word belongs to, inverted.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class ColumnsWeight:
    """See ``QuantisedWeight``. Weights are ``(code - zero) * scale`` of the input feature's group.

    codes: I32, [k * bits / 32, n] (``along_inputs``, GPTQ) or [k, n * bits / 32] (AWQ). zeros: I32 [groups, n
    * bits / 32], with 1 taken off if ``zeros_less_one``. scales: [groups, n]. group: input features a group.
    order: of the columns in a word. symmetric: what the settings say of the zero points.
    """

    dtype: str
    shape: tuple[int, ...]
    codes: Stored
    scales: Stored
    zeros: Stored
    bits: int
    group: int
    group_of_column: Stored | None = None
    zeros_less_one: bool = False
    along_inputs: bool = True
    order: tuple[int, ...] = _IN_ORDER
    symmetric: bool = False
    by_rows: bool = False

    @property
    def others(self) -> tuple[Stored, ...]:
        """The tensors beside the codes."""
        parts = (self.scales, self.zeros, self.group_of_column)
        return tuple(part for part in parts if part is not None)

    @property
    def block(self) -> tuple[int, int]:
        """(weights, bytes) of a word."""
        return 32 // self.bits, 4

    def locate(self, block: int) -> tuple[int, int]:
        """(row, column) of a weight of a word."""
        per_word = 32 // self.bits
        if self.along_inputs:
            place, row = divmod(block, self.shape[0])
            return row, place * per_word
        column, place = divmod(block, self.shape[0] // per_word)
        return place * per_word, column

    def decode(self, first: int, count: int) -> Floats:
        """float32 [count, k]; see ``QuantisedWeight``."""
        codes, scales, groups = self._parts(first, count)
        with np.errstate(all="ignore"):
            return np.ascontiguousarray((codes * scales[groups]).T)

    @property
    def symmetric_group(self) -> int | None:
        """See ``QuantisedWeight``."""
        return self.group if self.bits == 4 and self.symmetric else None

    def pairs(self, first: int, count: int) -> None:
        """None: codes are whole numbers."""

    def step_scales(self, first: int, count: int) -> Floats | None:
        """See ``QuantisedWeight``."""
        n, k = self.shape
        if self.bits == 8 or k % BLOCK or self.group % BLOCK:
            return None
        scales = scale_values(scale_array(self.scales).reshape(-1, n)[:, first : first + count], self.scales)
        in_order = np.array_equal(self._groups(len(scales)), np.arange(k) // self.group)
        return scales if in_order else None

    def steps(self, first: int, count: int) -> Steps:
        """See ``QuantisedWeight``."""
        codes, scales, groups = self._parts(first, count)
        return Steps(np.ascontiguousarray(codes.T.astype(np.int8)), scales[groups[::BLOCK]].T)

    def _parts(self, first: int, count: int) -> tuple[Floats, Floats, Array]:
        """Codes less their zero points [k, count], scales [groups, count], each input feature's group [k]."""
        n, k = self.shape
        columns = np.arange(first, first + count)
        words = self.codes.array("U32")
        if self.along_inputs:
            shifts = np.arange(0, 32, self.bits, dtype=np.uint32)[None, :, None]
            taken = words.reshape(-1, n)[:, None, first : first + count]
            codes = (taken >> shifts & np.uint32(self._mask)).reshape(-1, count)[:k]
        else:
            codes = self._columns(words.reshape(k, -1), columns)
        zeros = self._columns(self._zeros().reshape(-1, n * self.bits // 32), columns)
        scales = scale_values(scale_array(self.scales).reshape(-1, n)[:, columns], self.scales)
        groups = self._groups(len(scales))
        return codes.astype(np.float32) - zeros.astype(np.float32)[groups], scales, groups

    def _zeros(self) -> Array:
        """The words of zero points. 1 was taken off a whole word's codes at once, borrows and all."""
        words = self.zeros.array("U32")
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        return words + np.uint32(ones) if self.zeros_less_one else words

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1

    def _columns(self, words: Array, columns: Array) -> Array:
        """[rows of words, len(columns)]: codes packed along the columns."""
        per_word = 32 // self.bits
        order = np.array(self.order[:per_word], np.uint32)
        shifts = order[columns % per_word] * np.uint32(self.bits)
        chosen: Array = words[:, columns // per_word] >> shifts & np.uint32(self._mask)
        return chosen

    def _groups(self, num_groups: int) -> Array:
        if self.group_of_column is not None:
            return group_of_column(self.group_of_column, num_groups)
        return np.arange(self.shape[1]) // self.group
