"""Keys and values that lie in the host's memory, read ahead while a token of one sequence is decoded: copied
to VRAM while the CPU computes experts of the layers before, when nothing else is on the link.

In the one stream of a token such a copy comes between what the CPU is handed and the wait for its result. It
has a buffer, one of those of passes, from the attention of the layer before in that memory until that of its
own layer; the new position goes back to the host behind it. What is copied has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from krasis.formats.models.mixers import Attention
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.attention_rows import CacheRows
from krasis.runtime.gpu.kernels.move_positions import Moved
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.row_tables import TokenTables

BUFFER = 0


@dataclass(frozen=True, slots=True)
class Ahead:
    """A part of a layer's positions, to be copied in a gap."""

    layer: int
    part: int
    num_parts: int


def gaps_of(host_layers: Sequence[int], gaps: Sequence[int]) -> dict[int, Ahead]:
    """What is copied in which gap. gaps: the layers, ascending, in which the GPU waits for the CPU; one's gap
    comes behind its attention. A layer has those since the last one before it, shared out evenly; one
    without any is read where it lies."""
    found, begin = {}, 0
    for layer in host_layers:
        own = [gap for gap in gaps if begin <= gap < layer]
        found.update({gap: Ahead(layer, part, len(own)) for part, gap in enumerate(own)})
        begin = layer
    return found


class KvAhead:
    """For the graph of one row, of a model whose experts the CPU computes."""

    def __init__(self, model: GpuModel, tables: TokenTables) -> None:
        self._model, self._tables = model, tables
        self._numbers = model.shape.expert_layers
        parts = model.cache.parts
        on_host = [layer for layer, part in enumerate(parts) if part is not None and part.on_host]
        self._gaps = gaps_of(on_host, self._numbers)
        self._layers = {ahead.layer for ahead in self._gaps.values()}

    def place(self, layer: int) -> CacheRows | None:
        """Where the token's attention finds what a layer keeps of its sequence; None: where it lies."""
        return self._buffer(layer) if layer in self._layers else None

    def fetch(self, stream: Stream, index: int) -> None:
        """In the gap of a layer, numbered among those with experts."""
        ahead = self._gaps.get(self._numbers[index])
        if ahead is not None:
            self._model.kernels.move_positions(
                stream, self._moved(ahead.layer), self._host(ahead.layer), self._buffer(ahead.layer),
                ahead.part, ahead.num_parts,
            )  # fmt: skip

    def put_back(self, stream: Stream, layer: int) -> None:
        """Behind a layer's attention: the new position is kept by the host."""
        if layer in self._layers:
            moved, to = self._moved(layer), self._host(layer)
            self._model.kernels.move_positions(stream, moved, self._buffer(layer), to)

    def _moved(self, layer: int) -> Moved:
        part, mixer = self._model.cache.part(layer), self._model.spec.layers[layer].mixer
        item_bytes = 1 if part.has_scales else 2
        window = mixer.window if isinstance(mixer, Attention) else None
        return Moved(part.num_kv_heads, part.head_dim * item_bytes, part.value_dim * item_bytes, window)

    def _host(self, layer: int) -> CacheRows:
        return self._tables.place(self._model.cache, layer)

    def _buffer(self, layer: int) -> CacheRows:
        cache = self._model.cache
        part, table, staging = cache.part(layer), self._tables.staging, cache.staging
        own = self._host(layer)
        if table is None or staging is None:
            return own
        memory, values = (staging.memory[BUFFER],), part.values - part.keys
        return replace(own, table=table, memory=memory, keys_offset=0, values_offset=values)
