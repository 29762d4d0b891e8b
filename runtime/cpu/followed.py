"""What the layer for multi-token prediction knows of one slot: the model's last hidden states there."""

from __future__ import annotations

import numpy as np

from krasis.runtime.batch import TokenIds
from krasis.runtime.cpu.blocks import FloatArray

KEPT_ROWS = 16  # hidden states before those of the last pass: the end of an answer that is taken back


class Followed:
    """slot: the model's, and the layer's own. base: the position that the layer's memory begins with; done:
    it is computed of base..done-1. end: one past the last position whose hidden state is known. The hidden
    states of done..end-1 are kept, and some before.
    """

    __slots__ = ("_rows", "_start", "_tokens", "base", "done", "slot")

    def __init__(self, slot: int, hidden: int) -> None:
        self.slot = slot
        self.base = self.done = self._start = 0
        self._rows: FloatArray = np.empty((0, hidden), np.float32)
        self._tokens: TokenIds = np.empty(0, np.int64)

    @property
    def end(self) -> int:
        """See the class."""
        return self._start + len(self._rows)

    def has(self, begin: int, end: int) -> bool:
        """Whether the hidden states of positions begin..end-1 are kept."""
        return self._start <= begin < end <= self.end

    def rows_of(self, begin: int, end: int) -> FloatArray:
        """Hidden states float32 [end - begin, hidden] of positions that are kept."""
        return self._rows[begin - self._start : end - self._start]

    def tokens_of(self, begin: int, end: int) -> TokenIds:
        """The tokens of positions that are kept."""
        return self._tokens[begin - self._start : end - self._start]

    def forget(self) -> None:
        """The slot's text is another."""
        self._rows, self._tokens = self._rows[:0], self._tokens[:0]
        self.base = self.done = self._start = 0

    def go_back(self, position: int) -> None:
        """The slot's text may be another from a position on."""
        if self.has(position - 1, position):
            self.done = min(self.done, position - 1)  # what is computed there saw the token that followed
        elif self.base < position <= self.done:
            # Of the position before nothing is left but what was made with another token after it: one row
            # that is not quite right serves better than none of all before it.
            self.done = position
        else:
            self.base = self.done = position
        count = position - self._start
        if 0 < count <= len(self._rows):
            self._rows, self._tokens = self._rows[:count], self._tokens[:count]
        else:
            self._rows, self._tokens, self._start = self._rows[:0], self._tokens[:0], position

    def add(self, rows: FloatArray, tokens: TokenIds) -> None:
        """Hidden states of the positions from end on, and the tokens there; copied."""
        self._rows = np.concatenate([self._rows, rows])
        self._tokens = np.concatenate([self._tokens, tokens])

    def drop(self) -> None:
        """Keeps no more than is needed."""
        count = min(self.done, self.end - KEPT_ROWS) - self._start
        if count > 0:
            self._rows, self._tokens = self._rows[count:].copy(), self._tokens[count:].copy()
            self._start += count
