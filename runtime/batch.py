"""What a backend computes in one call: tokens of one or several sequences, each at its own positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError

TokenIds = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
StateRows = npt.NDArray[Any]
WantedLogits = Literal["last", "all", "none"]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence: rows first_row.. of the batch, at positions start.. of a slot.

    logits: of which tokens they are wanted. cuts: the state can be taken back to behind each of the tokens
    afterwards, as long as no other pass is made of the slot.
    """

    slot: int
    first_row: int
    rows: int
    start: int
    logits: WantedLogits = "last"
    cuts: bool = False

    @property
    def end_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.rows

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + self.rows

    @property
    def num_logits(self) -> int:
        """Rows of logits that the span gives."""
        return {"last": 1, "all": self.rows, "none": 0}[self.logits]


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens: ids [T]. spans: cover the rows in order, each slot at most once."""

    tokens: TokenIds
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        row = 0
        for span in self.spans:
            if span.first_row != row or span.rows < 1 or span.start < 0:
                raise NativeError(
                    "spans do not cover the tokens in order", where="batch", got=span, limit=row
                )
            row = span.end_row
        if row != len(self.tokens) or not self.spans:
            raise NativeError("spans do not cover the tokens", where="batch", got=row, limit=len(self.tokens))
        if len({span.slot for span in self.spans}) != len(self.spans):
            raise NativeError("a slot has two spans", where="batch", got=[span.slot for span in self.spans])

    @property
    def num_logits(self) -> int:
        """Rows of logits that the batch gives."""
        return sum(span.num_logits for span in self.spans)

    def wanted_rows(self) -> list[int]:
        """The rows whose logits are wanted, ascending."""
        return [row for span in self.spans for row in range(span.end_row - span.num_logits, span.end_row)]


def batch_of(parts: Sequence[tuple[int, int, Sequence[int] | TokenIds, WantedLogits]]) -> Batch:
    """A batch of (slot, start, tokens, wanted logits) in order."""
    spans: list[Span] = []
    row = 0
    for slot, start, tokens, logits in parts:
        spans.append(Span(slot, row, len(tokens), start, logits))
        row += len(tokens)
    return Batch(np.concatenate([np.asarray(part[2], np.int64) for part in parts]), tuple(spans))


def one_sequence(
    tokens: TokenIds, start: int, logits: WantedLogits = "last", slot: int = 0, *, cuts: bool = False
) -> Batch:
    """A batch of one span."""
    return Batch(tokens, (Span(slot, 0, len(tokens), start, logits, cuts),))


class StateStore(Protocol):
    """What a backend keeps of its sequences, by slot: keys and values, later recurrent state.

    num_slots: sequences at once. capacity: positions of each. dtype: of keys and values, ``f16``, ``bf16`` or
    ``f32``. A slot is open from ``open`` to ``close``; a batch may use open slots alone. Positions must be
    computed in order: a span starts at most where the slot ends.
    """

    num_slots: int
    capacity: int
    dtype: str

    def open(self) -> int:
        """A free slot, empty. Raises ResourceError if there is none, or no memory for it."""
        ...

    def close(self, slot: int) -> None:
        """Gives the slot up."""
        ...

    def length(self, slot: int) -> int:
        """Positions that the slot holds: what lies at and beyond is nothing."""
        ...

    def restorable(self, slot: int, position: int) -> int:
        """The largest position <= position that ``rewind`` can go back to: position itself for keys and
        values, a checkpoint for recurrent state."""
        ...

    def rewind(self, slot: int, position: int) -> None:
        """Forgets what lies at and beyond position, which ``restorable`` gave."""
        ...

    def checkpoint(self, slot: int) -> None:
        """Makes the slot's length a position that can be restored. Nothing to do for keys and values."""
        ...

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[StateRows, StateRows]:
        """Keys and values of a layer's positions 0..num_tokens-1, each C-contiguous [num_kv_heads,
        num_tokens, head_dim] of dtype (bf16 as uint16 bits), buffers that the next call may overwrite.
        """
        ...

    def import_(self, slot: int, layer: int, keys: StateRows, values: StateRows) -> None:
        """Writes a layer's positions from 0 on; the slot's length becomes theirs."""
        ...
