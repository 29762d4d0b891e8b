"""Rows of hashed n-gram tables for a GPU: chosen and gathered on the host, whose disk has the tables, by the
code of the CPU, and copied to the device in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from krasis.runtime.batch import Batch, Span, TokenIds
from krasis.runtime.cpu.hashed_table import LayerTable, ask_for, layer_tables
from krasis.runtime.cpu.weights import ModelWeights
from krasis.runtime.device.api import Device, Event, Stream
from krasis.runtime.gpu.token_history import TokenHistory

ROWS = 1024
"""Tokens whose rows travel at once."""


class GpuTables:
    """The tables of a model. history: of the sequences whose tokens they are looked up for. columns: of all
    layers' rows of a token."""

    def __init__(
        self, device: Device, layers: Sequence[LayerTable], history: TokenHistory, dtype: torch.dtype
    ) -> None:
        self._device, self._layers, self.history, self._dtype = device, layers, history, dtype
        self.columns = sum(one.table.dim for one in layers)
        self._pieces: list[torch.Tensor] = []
        self._sent: list[Event | None] = [None, None]

    def pinned(self, num_rows: int) -> torch.Tensor:
        """[num_rows, columns] of the host, to gather into."""
        return self._device.pinned((num_rows, self.columns), self._dtype)

    def places(self, tokens: TokenIds, spans: Sequence[Span]) -> list[TokenIds]:
        """Numbers of the rows that a batch's tokens choose, [T, hashes] of each layer; the disk is asked for
        them. From here on the history has the tokens."""
        before = [self.history.before(span.slot, span.start).copy() for span in spans]
        for span in spans:
            self.history.put(span.slot, span.start, tokens[span.first_row : span.end_row])
        found = [one.chosen(tokens, spans, before) for one in self._layers]
        for one, places in zip(self._layers, found, strict=True):
            ask_for(one.rows.data, places)
        return found

    def gather(self, places: Sequence[TokenIds], out: torch.Tensor) -> None:
        """The rows at places into pinned memory [T, columns]."""
        self._device.host_writes(out)
        begin = 0
        for one, numbers in zip(self._layers, places, strict=True):
            out[:, begin : begin + one.table.dim].copy_(torch.from_numpy(one.embeddings(numbers)))
            begin += one.table.dim

    def run(self, stream: Stream, batch: Batch, out: torch.Tensor) -> None:
        """out [T, columns] = the rows of a pass's tokens."""
        if not self._pieces:
            self._pieces = [self.pinned(ROWS) for _ in range(2)]
        places = self.places(batch.tokens, batch.spans)
        for index, begin in enumerate(range(0, len(out), ROWS)):
            count, number = min(ROWS, len(out) - begin), index % 2
            piece, sent = self._pieces[number][:count], self._sent[number]
            if sent is not None:
                sent.synchronize()
            self.gather([one[begin : begin + count] for one in places], piece)
            stream.copy(out[begin : begin + count], piece)
            self._sent[number] = stream.record()


def open_tables(
    weights: ModelWeights, device: Device, dtype: torch.dtype, num_slots: int, capacity: int
) -> GpuTables | None:
    """Those of a model's layers; None for most models."""
    table = weights.spec.ngram
    if table is None:
        return None
    history = TokenHistory(num_slots, capacity, table.longest - 1, table.boundary)
    return GpuTables(device, list(layer_tables(weights).values()), history, dtype)
