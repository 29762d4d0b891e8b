"""A weight that a checkpoint holds quantised, seen as the matrix it stands for."""

from __future__ import annotations

from typing import Protocol

from krasis.formats.checkpoints.quantised.steps import Steps
from krasis.formats.checkpoints.quantised.stored import Bytes, Floats, Stored


class QuantisedWeight(Protocol):
    """One matrix, or all experts' matrices in one.

    dtype: ``fp8``, ``int4``, ...: a name for people; lower case, where GGML's types are upper. shape: [n, k]
    or [experts, n, k], as the model has it. codes: the tensor that holds the codes. others: the scales and
    what else goes with them. by_rows: whether the codes lie row after row. block: (weights, bytes) of what
    cannot be divided in ``codes``. symmetric_group: weights of a row that share a scale of symmetric codes of
    4 bits, by what headers and settings say; None for others.
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

    @property
    def symmetric_group(self) -> int | None: ...

    def decode(self, first: int, count: int) -> Floats:
        """float32 [count, k]: rows from ``first`` on, counted through all experts' matrices.

        Raises FormatError for scales that are no numbers, or parts that contradict each other.
        """

    def step_scales(self, first: int, count: int) -> Floats | None:
        """The scales of ``steps``, in any shape; None if these rows are no such."""

    def steps(self, first: int, count: int) -> Steps:
        """The rows as whole steps of scales. Raises FormatError as ``decode`` does."""

    def pairs(self, first: int, count: int) -> tuple[Bytes, Bytes] | None:
        """The rows as MXFP4: codes [count, k / 32, 16], byte j with elements 2j (low) and 2j + 1, and scales
        [count, k / 32]; None if they are no such. Raises FormatError as ``decode`` does.
        """

    def locate(self, block: int) -> tuple[int, int]:
        """(row, column) of the first weight of a block of the codes."""
