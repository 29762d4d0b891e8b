"""Which tokens are computed: what the blocks ask that look at more than the residual."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from krasis.formats.errors import NativeError
from krasis.runtime.batch import Batch, Span, TokenIds

Before = tuple[TokenIds, tuple[Span, ...]]


@dataclass(slots=True)
class CurrentRows:
    """The token ids of the rows of a pass and whose they are. Passes may run inside others, between their
    layers: ``begin`` gives what was current to be put back.
    """

    tokens: TokenIds = field(default_factory=lambda: np.empty(0, np.int64))
    spans: tuple[Span, ...] = ()

    def begin(self, batch: Batch) -> Before:
        """A batch is computed; what was current before."""
        before = self.tokens, self.spans
        self.tokens, self.spans = batch.tokens, tuple(batch.spans)
        return before

    def end(self, before: Before) -> None:
        """Puts back what ``begin`` gave."""
        self.tokens, self.spans = before

    def of(self, num_rows: int) -> TokenIds:
        """The ids of all rows. Raises NativeError if these are others."""
        if len(self.tokens) != num_rows:
            raise NativeError("no batch of so many rows is computed", got=num_rows, limit=len(self.tokens))
        return self.tokens
