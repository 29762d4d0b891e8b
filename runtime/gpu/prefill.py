"""One pass of a chunk of tokens through the model: the loop over the layers, on one rank.

Every step only enqueues; the host meets the device when the logits are read (and where a stage needs its
choice of experts, and a few layers behind where somebody wants to know of them). The module docstring of
``distributed/parallel.py`` says what is exchanged where; with one rank that is nothing. Rows of several
sequences share every product; attention alone goes through them one by one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.backend import LayerProgress
from krasis.runtime.batch import Batch
from krasis.runtime.device.api import Event, Stream
from krasis.runtime.gpu.blocks.attention import GpuAttention
from krasis.runtime.gpu.blocks.experts import GpuExperts
from krasis.runtime.gpu.blocks.latent import GpuLatentAttention
from krasis.runtime.gpu.blocks.latent_rows import LatentRows
from krasis.runtime.gpu.blocks.rows import StateBlock
from krasis.runtime.gpu.blocks.streams import begin_streams
from krasis.runtime.gpu.blocks.table import Blocks
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.chunk import Chunk, Piece, chunk_of
from krasis.runtime.gpu.exchange import RowExchange
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.experts.stage import ExpertStage, Step
from krasis.runtime.gpu.kernels.attention_codes import Seen, attend_kept
from krasis.runtime.gpu.kernels.attention_rows import CachePlace
from krasis.runtime.gpu.kernels.embedding import Embedding
from krasis.runtime.gpu.kernels.gated_delta import DeltaPlace
from krasis.runtime.gpu.kernels.router_product import router_product
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.kv_rings import ring_place
from krasis.runtime.gpu.kv_staging import turns_of
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel import KvPart, Parallel
from krasis.runtime.gpu.prefill_delta import apply_state, table_parts
from krasis.runtime.gpu.weights import GpuInt8

MAX_AHEAD = 2
# Of long layers fewer are submitted ahead, for what comes between layers has to wait for them: one of this
# many seconds and more, none of so many; then the device waits some 0.1 ms a layer for the host.
LONG_LAYER_S, LONGER_LAYER_S = 0.01, 0.05


class PassProgress:
    """Tells how many layers are done. So that what the callback does comes between layers, and an end of the
    pass soon, the host is at most MAX_AHEAD layers ahead of the device while there is a callback; without one
    as far as it gets."""

    def __init__(
        self, callback: LayerProgress | None, num_layers: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._callback, self._num_layers, self._clock = callback, num_layers, clock
        self._running: deque[Event] = deque()
        self._num_done = 0
        self._since_s, self._layer_s = clock(), 0.0

    def submitted(self, stream: Stream) -> None:
        """A layer is, to that stream. Returns when few enough of them are not done."""
        if self._callback is None:
            return
        self._running.append(stream.record())
        while self._running and (self._running[0].is_done() or len(self._running) > self.num_ahead):
            self._running[0].synchronize()
            self._next()

    @property
    def num_ahead(self) -> int:
        """Layers that may be submitted and not done, by how long the last ones took."""
        return MAX_AHEAD - (self._layer_s >= LONG_LAYER_S) - (self._layer_s >= LONGER_LAYER_S)

    def wait(self) -> None:
        """Returns when the last layer is done."""
        while self._running:
            self._running[0].synchronize()
            self._next()

    def _next(self) -> None:
        self._running.popleft()
        self._num_done += 1
        # Layers that were done while the callback did something else say nothing of their time.
        self._layer_s = max(self._clock() - self._since_s, 0.9 * self._layer_s)
        if self._callback is not None:
            self._callback(self._num_done, self._num_layers)
        self._since_s = self._clock()


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """``PassRows`` of a chunk. buffers: of all ranks' rows. counts: how often each expert was chosen is told
    to the residency, if there is one."""

    model: GpuModel
    parallel: Parallel
    stage: ExpertStage
    chunk: Chunk
    buffers: Buffers
    own: Buffers
    exchange: RowExchange
    residency: Residency | None
    takes_x: bool = True

    @property
    def stream(self) -> Stream:
        """See ``PassRows``."""
        return self.model.stream

    def product(
        self, x: torch.Tensor, weight: GpuInt8, out: torch.Tensor, residual: torch.Tensor | None = None
    ) -> None:
        """See ``PassRows``."""
        if len(x):
            self.model.many_rows.dense_product(
                self.stream, x, weight.codes, weight.scales, out, residual=residual
            )

    def normed_product(self, norm: torch.Tensor, eps: float, weight: GpuInt8, out: torch.Tensor) -> None:
        """See ``PassRows``."""
        self.model.kernels.rms_norm(self.stream, self.own.hidden, norm, eps, self.own.x)
        self.product(self.own.x, weight, out)

    def choose(self, block: GpuExperts) -> bool:
        """See ``PassRows``: of many rows, one after the other."""
        return False

    def x_is_ready(self) -> None:
        """See ``PassRows``."""
        self.exchange.send_x()

    def small_product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """See ``PassRows``."""
        if len(x):
            router_product(self.stream, x, weight, out)

    def attend(self, block: GpuAttention, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        """See ``PassRows``."""
        cache, pieces = self.model.cache, self.chunk.pieces
        if cache.part(block.layer).on_host:
            for piece in pieces:
                with self._staged(block.layer, piece) as place:
                    self._store(block, qkv, piece, place)
                    self._see(block, qkv, attended, piece, place)
            return
        if cache.part(block.layer).ring:
            for piece in pieces:
                with ring_place(self.stream, cache, block.layer, piece, self.buffers.window_kv) as place:
                    self._store(block, qkv, piece, place)
                    self._see(block, qkv, attended, piece, place)
            return
        places = []
        for piece in pieces:
            scales = cache.scales(piece.slot, block.layer)
            places.append(CachePlace(*cache.layer(piece.slot, block.layer), piece.position, scales=scales))
            self._store(block, qkv, piece, places[-1])
        self._share_kv(block.layer)
        for piece, place in zip(pieces, places, strict=True):
            self._see(block, qkv, attended, piece, place)

    def _store(self, block: GpuAttention, qkv: torch.Tensor, piece: Piece, place: CachePlace) -> None:
        rows, form, skipped = qkv[piece.first : piece.last], block.form, piece.position - place.start
        if skipped:  # places are numbered from there on
            form = replace(form, cos=form.cos[skipped:], sin=form.sin[skipped:])
        self.model.kernels.qk_norm_rope_store(self.stream, rows, block.heads, form, place)

    def _see(
        self, block: GpuAttention, qkv: torch.Tensor, attended: torch.Tensor, piece: Piece, place: CachePlace
    ) -> None:
        seen = Seen(place.keys, place.values, place.scales, self.model.cache.scratch)
        rows, out = qkv[piece.first : piece.last], attended[piece.first : piece.last]
        attend_kept(
            self.stream, block.heads, rows, seen, place.start, out,
            scale=block.scale, window=block.window, sinks=block.sinks,
        )  # fmt: skip

    @contextmanager
    def _staged(self, layer: int, piece: Piece) -> Iterator[CachePlace]:
        """Where a piece's keys and values lie meanwhile, of a layer that keeps them in the host's memory."""
        staging = self.model.cache.staging
        if staging is None:
            raise NativeError("no layer is kept in the host's memory", where="prefill", got=layer)
        keys, values, *scales = staging.take(self.stream, layer, piece.slot)
        kept = (scales[0], scales[1]) if scales else None
        yield CachePlace(keys, values, piece.position, scales=kept)
        staging.give_back(self.stream)

    def _share_kv(self, layer: int) -> None:
        if self.parallel.num_ranks > 1:
            for parts in kv_parts(self.model.cache, self.chunk, layer):
                self.parallel.share_kv(self.stream, parts, self.buffers.shared_kv)

    def apply_state(self, block: StateBlock, gates: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """See ``PassRows``."""
        apply_state(self, block, gates, out)

    def table_parts(self, layer: int) -> Iterator[tuple[int, int, DeltaPlace]]:
        """See ``PassRows``."""
        return table_parts(self, layer)

    def attend_latent(self, block: GpuLatentAttention, rows: LatentRows, attended: torch.Tensor) -> None:
        """See ``PassRows``."""
        chunk, cache = self.chunk, self.model.cache
        if cache.part(block.layer).on_host:
            for piece in chunk.pieces:
                with self._staged(block.layer, piece) as place:
                    part = rows.part(piece.first, piece.last)
                    block.store(self.stream, part, place)
                    block.attend(self, part, place, attended[piece.first : piece.last])
            return
        places = [CachePlace(*cache.layer(one.slot, block.layer), one.position) for one in chunk.pieces]
        parts = [rows.part(piece.first, piece.last) for piece in chunk.pieces]
        for part, place in zip(parts, places, strict=True):
            block.store(self.stream, part, place)
        self._share_kv(block.layer)
        for piece, part, place in zip(chunk.pieces, parts, places, strict=True):
            block.attend(self, part, place, attended[piece.first : piece.last])

    def route(self, block: GpuExperts) -> None:
        """See ``PassRows``."""
        b = self.own
        counts = None if self.residency is None else self.residency.counts[block.index]
        self.model.kernels.route(
            self.stream, b.router_logits, block.router, b.ids, b.weights, block.vectors, counts=counts
        )
        self.exchange.send_choice()

    def run_experts(self, block: GpuExperts) -> None:
        """See ``PassRows``."""
        b, stream, count = block.seen(self.buffers), self.stream, self.chunk.num_tokens
        self.exchange.gather()
        step = Step(
            normed=b.normed,
            x=b.gathered_x,
            ids=b.gathered_ids,
            weights=b.gathered_weights,
            hidden=b.hidden,
            partial=b.partial,
            buffers=b,
            num_tokens=count,
        )
        self.stage.run(stream, block.index, step)
        self.exchange.add()


class PrefillPass:
    """Runs batches, one at a time. residency: is told how often each expert was chosen."""

    def __init__(
        self, model: GpuModel, blocks: Blocks, parallel: Parallel, residency: Residency | None = None
    ) -> None:
        self._model, self._blocks = model, blocks
        self._parallel, self._residency = parallel, residency
        self._embedding = Embedding(model.device, model.weights.embedding)
        self._beside = model.device.stream("exchange") if parallel.num_ranks > 1 else None

    def run(
        self, batch: Batch, buffers: Buffers, stage: ExpertStage, layer_done: LayerProgress | None = None
    ) -> Chunk:
        """From the tokens to the last layer's output in buffers.hidden; keys and values in the cache. With
        layer_done the host waits for the last layer here; what it raises ends the pass, whose submitted
        layers may still run. It may have tokens of other sequences decoded: on the same stream they come
        between two layers, in buffers of their own, and experts that live in VRAM stay where they are."""
        with nullcontext() if self._residency is None else self._residency.unchanged():
            return self._run(batch, buffers, stage, layer_done)

    def _run(
        self, batch: Batch, buffers: Buffers, stage: ExpertStage, layer_done: LayerProgress | None
    ) -> Chunk:
        progress = PassProgress(layer_done, len(self._blocks))
        model, stream = self._model, self._model.stream
        chunk = chunk_of(batch, self._parallel)
        if self._residency is not None:
            self._residency.prepare(stream)
        # Embeddings first: behind the first experts, which the stage sends for at once, they would wait their
        # turn on the link, and everything else for them.
        self._embedding.run(stream, batch.tokens, chunk.segments, buffers)
        begin_streams(stream, buffers)
        if model.tables is not None:
            model.tables.run(stream, batch, buffers.table_rows)
        _begin_staging(model, chunk)
        stage.begin(stream, chunk.num_tokens)
        own = buffers.own(chunk.own)
        exchange = RowExchange(stream, self._beside, self._parallel, buffers, chunk.num_tokens)
        rows = PrefillRows(model, self._parallel, stage, chunk, buffers, own, exchange, self._residency)
        for blocks in self._blocks:
            for block in blocks:
                block.run(rows)
            progress.submitted(stream)
        stage.end(stream)
        model.cache.settle(stream)
        if self._residency is not None and chunk.own:
            self._residency.note_tokens(stream, chunk.own)
        progress.wait()
        return chunk


def _begin_staging(model: GpuModel, chunk: Chunk) -> None:
    """Sends for what the first layers that are kept in the host's memory have there."""
    cache = model.cache
    if cache.staging is not None:
        pieces = [(one.slot, one.position, one.position + one.last - one.first) for one in chunk.pieces]
        cache.staging.begin(model.stream, turns_of(model.spec, cache.parts, pieces))


def kv_parts(cache: GpuKvCache, chunk: Chunk, layer: int) -> list[list[KvPart]]:
    """One layer's keys and values of the chunk's tokens, and their scales, for a ``share_kv`` each."""
    kept = ((span, cache.pairs(span.slot, layer)) for span in chunk.spans)
    found = [[KvPart(*pair, span.start, span.end) for pair in pairs] for span, pairs in kept]
    return [list(parts) for parts in zip(*found, strict=True)]
