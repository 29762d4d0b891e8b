"""A backend that keeps one sequence, as a ``Backend``."""

from __future__ import annotations

from typing import cast

import numpy as np

from krasis.runtime.backend import KvRows
from krasis.runtime.batch import Batch, Logits, TokenIds
from krasis.runtime.state.one_slot import OneSlot


class OneSequence:
    """Gives ``run`` and ``state`` to a class that computes one sequence by ``prefill`` and ``decode``."""

    capacity: int
    kv_dtype: str
    _one_slot: OneSlot | None = None

    @property
    def state(self) -> OneSlot:
        """See ``backend.Backend``: one slot."""
        if self._one_slot is None:
            self._one_slot = OneSlot(self.capacity, self.kv_dtype, self.export_kv, self.import_kv)
        return self._one_slot

    def run(self, batch: Batch) -> Logits:
        """See ``backend.Backend``."""
        state = self.state
        state.begin(batch)
        (span,) = batch.spans
        if span.rows == 1 and span.logits == "last":
            logits = self.decode(int(batch.tokens[0]), span.start)[None]
        else:
            logits = self.prefill(batch.tokens, span.start, span.logits == "all")
        state.advance(batch.spans)
        return logits[:0] if span.logits == "none" else logits

    def prefill(self, tokens: TokenIds, start: int, want_all: bool) -> Logits:
        """Logits [T or 1, vocab] of tokens at positions start.., of all or of the last."""
        raise NotImplementedError

    def decode(self, token: int, position: int) -> Logits:
        """Logits [vocab] of one token."""
        return cast("Logits", self.prefill(np.array([token], np.int64), position, False)[0])

    def export_kv(self, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """See ``StateStore.export``."""
        raise NotImplementedError

    def import_kv(self, layer: int, keys: KvRows, values: KvRows) -> None:
        """See ``StateStore.import_``."""
        raise NotImplementedError
