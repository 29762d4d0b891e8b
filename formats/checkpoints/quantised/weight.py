"""A weight that a checkpoint holds quantised, seen as the matrix it stands for."""

from __future__ import annotations

from typing import Protocol

from krasis.formats.checkpoints.quantised.steps import Steps
from krasis.formats.checkpoints.quantised.stored import Floats, Stored


class QuantisedWeight(Protocol):
    """One matrix, or all experts' matrices in one.

    dtype: ``fp8``, ``int4``, ...: a name for people; lower case, where GGML's types are upper. shape: [n, k]
    or [experts, n, k], as the model has it. codes: the tensor that holds the codes. others: the scales and
    what else goes with them. by_rows: whether the codes lie row after row. block: (weights, bytes) of what
    cannot be divided in ``codes``.
    """

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def codes(self) -> Stored: ...

    @property
    def others(self) -> tuple[Stored, ...]: ...

    @property
    def by_rows(self) -> bool: ...

    @property
    def block(self) -> tuple[int, int]: ...

    def decode(self, first: int, count: int) -> Floats:
        """float32 [count, k]: rows from ``first`` on, counted through all experts' matrices.

        Raises FormatError for scales that are no numbers, or parts that contradict each other.
        """

    def is_steps(self, first: int, count: int) -> bool:
        """Whether ``steps`` has these rows."""

    def steps(self, first: int, count: int) -> Steps:
        """The rows as whole steps of scales that float16 holds. Raises FormatError as ``decode`` does."""

    def locate(self, block: int) -> tuple[int, int]:
        """(row, column) of the first weight of a block of the codes."""
