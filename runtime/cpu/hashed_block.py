"""A layer's hashed n-gram table on the CPU: products by native kernels, the rest, of few layers, in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from krasis.runtime import reference
from krasis.runtime.cpu.blocks import CpuContext, Rows
from krasis.runtime.cpu.float_streams import dilated, table_gates
from krasis.runtime.cpu.hashed_table import HashedTables
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.stream_kernels import stream_norm
from krasis.runtime.cpu.weights import LayerWeights

FloatArray = npt.NDArray[np.float32]


class CpuHashedTable:
    """hidden += the rows that the last tokens choose, weighed by stream, and a convolution of them."""

    def __init__(self, context: CpuContext, tables: HashedTables, index: int, weights: LayerWeights) -> None:
        self._context, self._tables, self._index = context, tables, index
        self._key, self._value = weights.int8("ngram.key"), weights.int8("ngram.value")
        self._norms = [weights.vector(f"ngram.{part}_norm") for part in ("key", "query", "conv")]
        self._taps = np.ascontiguousarray(weights.vector("ngram.conv").T)
        self._dim, self._width = tables.layers[index].table.dim, context.spec.residual_width
        buffers = context.buffers
        buffers.reserve("table_rows", self._dim)
        buffers.reserve("table_keys", self._key.num_rows)
        buffers.reserve("table_values", self._value.num_rows)
        for name in ("table_queries", "table_gated", "table_normed"):
            buffers.reserve(name, self._width)
        buffers.reserve_acts(self._dim)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``blocks.Block``."""
        buffers, spec, num = self._context.buffers, self._context.spec, rows.num
        eps, hidden = spec.norm.eps, spec.hidden
        embedded, acts = buffers.rows("table_rows", num, self._dim), buffers.acts(num, self._dim)
        keys = buffers.rows("table_keys", num, self._key.num_rows)
        values = buffers.rows("table_values", num, self._value.num_rows)
        queries, gated, normed = (
            buffers.rows(f"table_{name}", num, self._width) for name in ("queries", "gated", "normed")
        )
        kernels.step("look table rows up", lambda: self._look_up(embedded))
        kernels.quantize(embedded, acts)
        kernels.gemm_int8_rows(acts, self._key.codes, self._key.scales, keys)
        kernels.gemm_int8_rows(acts, self._value.codes, self._value.scales, values)
        stream_norm(kernels, keys, self._norms[0], eps, hidden, keys)
        stream_norm(kernels, rows.hidden, self._norms[1], eps, hidden, queries)
        kernels.step("weigh table rows", lambda: self._weigh(keys, queries, values, gated))
        stream_norm(kernels, gated, self._norms[2], eps, hidden, normed)
        kernels.step("add table rows", lambda: self._add(rows.hidden, gated, normed))

    def _look_up(self, out: FloatArray) -> None:
        _, own, _, places = self._tables.of(self._index)
        out[...] = own.embeddings(places)

    def _weigh(self, keys: FloatArray, queries: FloatArray, values: FloatArray, out: FloatArray) -> None:
        shape = (len(keys), -1, self._context.spec.hidden)
        gates = table_gates(keys.reshape(shape), queries.reshape(shape))
        np.multiply(gates[:, :, None], values[:, None, : shape[2]], out=out.reshape(shape))

    def _add(self, hidden: FloatArray, gated: FloatArray, normed: FloatArray) -> None:
        """The gated values and silu of their convolution; the state of the spans' slots goes on."""
        store, own, batch, _ = self._tables.of(self._index)
        hidden += gated
        for span in batch.spans:
            rows = slice(span.first_row, span.end_row)
            past = own.past(store, span.slot)
            if span.start == 0:
                past[...] = 0
            hidden[rows] += reference.silu(dilated(past, normed[rows], self._taps, own.table.dilation))
        own.remember(store, batch.tokens, batch.spans)
