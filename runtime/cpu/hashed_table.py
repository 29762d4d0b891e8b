"""Rows of hashed n-gram tables, which stay on the disk: what the last tokens of sequences choose.

A table is mapped and read a few rows a token. The rows of a batch are asked for before any layer runs, so
that a disk fetches them together and while the layers before are computed.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.files.file_mapping import advise
from krasis.formats.models.ngram import TableHash, table_hash
from krasis.formats.models.spec import NgramTable
from krasis.runtime.batch import Batch, Span, TokenIds
from krasis.runtime.cpu.weights import FloatWeight, ModelWeights
from krasis.runtime.state.hybrid_store import HybridStore
from krasis.runtime.state.kv_store import KvStore

FloatArray = npt.NDArray[np.float32]
MOST_ASKED = 4096  # rows of a batch that are asked for ahead


@dataclass(frozen=True, slots=True)
class LayerTable:
    """A layer's table with its hashes. rows: [rows, channels], mapped."""

    index: int
    rows: FloatWeight
    hashes: TableHash
    table: NgramTable

    def places(self, store: HybridStore, tokens: TokenIds, spans: Sequence[Span]) -> TokenIds:
        """[T, hashes] row numbers of a batch's tokens. The state must be that of the spans' starts."""
        none = np.full(self.table.longest - 1, self.hashes.boundary, np.int64)
        before = [self._ids(store, one.slot).astype(np.int64) if one.start else none for one in spans]
        return self.chosen(tokens, spans, before)

    def chosen(self, tokens: TokenIds, spans: Sequence[Span], before: Sequence[TokenIds]) -> TokenIds:
        """As ``places``; before: the last ids before each span."""
        found = np.empty((len(tokens), len(self.hashes.moduli)), np.int64)
        for span, past in zip(spans, before, strict=True):
            history = np.concatenate([past, tokens[span.first_row : span.end_row]])
            found[span.first_row : span.end_row] = self.hashes.rows(history)
        return found

    def remember(self, store: HybridStore, tokens: TokenIds, spans: Sequence[Span]) -> None:
        """Puts the last token ids of each span in the place of those before."""
        for span in spans:
            ids = self._ids(store, span.slot)
            if span.start == 0:
                ids[:] = self.hashes.boundary
            new = tokens[span.first_row : span.end_row][-len(ids) :]
            ids[: len(ids) - len(new)] = ids[len(new) :].copy()
            ids[len(ids) - len(new) :] = new

    def embeddings(self, places: TokenIds) -> FloatArray:
        """[T, dim] of the rows at these places, one after the other."""
        return self.rows.rows(places.reshape(-1)).reshape(len(places), self.table.dim)

    def past(self, store: HybridStore, slot: int) -> FloatArray:
        """A view of the convolution's earlier inputs, [past_rows, width], the oldest first."""
        kept = store.table(slot, self.index)[: -(self.table.longest - 1)]
        return kept.reshape(self.table.past_rows, -1)

    def _ids(self, store: HybridStore, slot: int) -> npt.NDArray[np.int32]:
        """A view of the last token ids, as their bits."""
        return store.table(slot, self.index)[-(self.table.longest - 1) :].view(np.int32)


@dataclass(slots=True)
class HashedTables:
    """The tables of a model, and what the batch that is computed chose of them. store: of its sequences.

    Batches may be computed inside others, between their layers: ``begin`` gives what was current to be put
    back.
    """

    store: HybridStore | None
    layers: dict[int, LayerTable]
    chosen: dict[int, TokenIds] = field(default_factory=dict)
    batch: Batch | None = None

    def begin(self, batch: Batch) -> tuple[Batch | None, dict[int, TokenIds]]:
        """Works out which rows a batch needs and asks the disk for them; what was current before."""
        before = (self.batch, self.chosen)
        if self.store is not None and self.layers:
            store = self.store
            self.batch = batch
            self.chosen = {i: one.places(store, batch.tokens, batch.spans) for i, one in self.layers.items()}
            for index, places in self.chosen.items():
                ask_for(self.layers[index].rows.data, places)
        return before

    def end(self, before: tuple[Batch | None, dict[int, TokenIds]]) -> None:
        """Puts back what ``begin`` gave."""
        self.batch, self.chosen = before

    def of(self, index: int) -> tuple[HybridStore, LayerTable, Batch, TokenIds]:
        """The store, a layer's table, the batch that is computed and the rows that it chose."""
        if self.store is None or self.batch is None or index not in self.layers:
            raise NativeError("no batch is computed, or the layer has no hashed table", where="n-gram table")
        return self.store, self.layers[index], self.batch, self.chosen[index]


def hashed_tables(weights: ModelWeights, store: KvStore) -> HashedTables:
    """The tables of a model's layers; none of most models."""
    if weights.spec.ngram is None or not isinstance(store, HybridStore):
        return HashedTables(None, {})
    return HashedTables(store, layer_tables(weights))


def layer_tables(weights: ModelWeights) -> dict[int, LayerTable]:
    """The tables by layer."""
    spec, layers = weights.spec, dict[int, LayerTable]()
    if spec.ngram is None:
        return layers
    for index, layer in enumerate(weights.layers):
        if layer.layer.ngram:
            rows = layer.matrix("ngram.table")
            advise(int(rows.data.ctypes.data), rows.data.nbytes, mmap.MADV_RANDOM)
            layers[index] = LayerTable(index, rows, table_hash(spec, len(layers)), spec.ngram)
    return layers


def ask_for(rows: npt.NDArray[np.generic], places: TokenIds) -> None:
    """Tells the kernel of a few rows that they will be read; of many it is faster to just read them."""
    if places.size > MOST_ASKED:
        return
    begin, row_bytes = int(rows.ctypes.data), rows.strides[0]
    for row in np.unique(places).tolist():
        advise(begin + row * row_bytes, row_bytes, mmap.MADV_WILLNEED)
