"""A layer's hashed n-gram table on a GPU: what the rows that the last tokens chose add to the streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krasis.formats.errors import NativeError
from krasis.runtime.gpu.blocks.rows import PassRows

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuHashedTable:
    """layer: its number. The rows come from ``Buffers.table_rows``, where each layer has its columns."""

    def __init__(self, model: GpuModel, layer: int) -> None:
        weights, table = model.weights.layers[layer], model.spec.ngram
        if table is None:
            raise NativeError("the model has no hashed table", where=f"layer {layer}")
        self._kernels, self._eps, self._table = model.kernels, model.spec.norm.eps, table
        self._key, self._value = weights.int8("ngram.key"), weights.int8("ngram.value")
        self._norms = [weights.plain(f"ngram.{part}_norm") for part in ("key", "query", "conv")]
        self._conv = weights.plain("ngram.conv")
        number = sum(one.ngram for one in model.spec.layers[:layer])
        self._columns = slice(number * table.dim, (number + 1) * table.dim)
        self.layer = layer

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b, stream, kernels = rows.own, rows.stream, self._kernels
        for first, last, place in rows.table_parts(self.layer):
            count = last - first
            x, streams = b.table_rows[first:last, self._columns], b.streams[first:last]
            keys, values = b.stream_normed[:count], b.table_values[:count]
            rows.product(x, self._key, keys)
            rows.product(x, self._value, values)
            gated = b.stream_gates[:count]
            kernels.table_weigh(stream, streams, keys, values, self._norms, self._eps, gated, keys)
            kernels.table_add(stream, streams, gated, keys, self._conv, self._table.dilation, place)
