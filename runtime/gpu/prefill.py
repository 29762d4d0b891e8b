"""One pass of a chunk of tokens through the model: the loop over the layers, on one rank.

Every step only enqueues; the host meets the device when the logits are read (and where a stage needs its
choice of experts, and a few layers behind where somebody wants to know of them). The module docstring of
``distributed/parallel.py`` says what is exchanged where; with one rank that is nothing. Rows of several
sequences share every product; attention alone goes through them one by one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from krasis.runtime.backend import LayerProgress
from krasis.runtime.batch import Batch
from krasis.runtime.device.api import Event, Stream
from krasis.runtime.gpu.blocks.attention import GpuAttention
from krasis.runtime.gpu.blocks.experts import GpuExperts
from krasis.runtime.gpu.blocks.gated_delta import GpuGatedDelta
from krasis.runtime.gpu.blocks.latent import GpuLatentAttention
from krasis.runtime.gpu.blocks.table import Blocks
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.chunk import Chunk, chunk_of
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.experts.stage import ExpertStage, Step
from krasis.runtime.gpu.kernels.attention import attend
from krasis.runtime.gpu.kernels.attention_rows import CachePlace
from krasis.runtime.gpu.kernels.embedding import Embedding
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel import KvPart, Parallel
from krasis.runtime.gpu.prefill_delta import apply_delta
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

    def small_product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """See ``PassRows``."""
        if len(x):
            router_product(self.stream, x, weight, out)

    def attend(self, block: GpuAttention, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        """See ``PassRows``."""
        m, chunk, cache = self.model, self.chunk, self.model.cache
        for piece in chunk.pieces:
            place = CachePlace(*cache.layer(piece.slot, block.layer), piece.position)
            rows = qkv[piece.first : piece.last]
            m.kernels.qk_norm_rope_store(self.stream, rows, block.heads, block.form, place)
        if self.parallel.num_ranks > 1:
            self.parallel.share_kv(self.stream, kv_parts(cache, chunk, block.layer))
        for piece in chunk.pieces:
            keys, values = cache.layer(piece.slot, block.layer)
            rows, out = qkv[piece.first : piece.last], attended[piece.first : piece.last]
            attend(
                self.stream, block.heads, rows, keys, values, piece.position, out,
                scale=block.scale, window=block.window, sinks=block.sinks,
            )  # fmt: skip

    def apply_delta(self, block: GpuGatedDelta, gates: torch.Tensor, out: torch.Tensor) -> None:
        """See ``PassRows``."""
        apply_delta(self, block, gates, out)

    def attend_latent(
        self, block: GpuLatentAttention, q: torch.Tensor, kv: torch.Tensor, attended: torch.Tensor
    ) -> None:
        """See ``PassRows``."""
        chunk, cache = self.chunk, self.model.cache
        places = [CachePlace(*cache.layer(one.slot, block.layer), one.position) for one in chunk.pieces]
        for piece, place in zip(chunk.pieces, places, strict=True):
            block.store(self.stream, q[piece.first : piece.last], kv[piece.first : piece.last], place)
        if self.parallel.num_ranks > 1:
            self.parallel.share_kv(self.stream, kv_parts(cache, chunk, block.layer))
        for piece, place in zip(chunk.pieces, places, strict=True):
            rows, out = q[piece.first : piece.last], attended[piece.first : piece.last]
            block.attend(self.stream, self.buffers, rows, place, out)

    def route(self, block: GpuExperts) -> None:
        """See ``PassRows``."""
        b = self.own
        counts = None if self.residency is None else self.residency.counts[block.index]
        self.model.kernels.route(
            self.stream, b.router_logits, block.router, b.ids, b.weights, block.vectors, counts=counts
        )

    def run_experts(self, block: GpuExperts) -> None:
        """See ``PassRows``."""
        b, stream, count = self.buffers, self.stream, self.chunk.num_tokens
        *gather, add = exchange_rows(stream, self.parallel, b, count)
        for exchange in gather:
            exchange()
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
        add()


class PrefillPass:
    """Runs batches, one at a time. residency: is told how often each expert was chosen."""

    def __init__(
        self, model: GpuModel, blocks: Blocks, parallel: Parallel, residency: Residency | None = None
    ) -> None:
        self._model, self._blocks = model, blocks
        self._parallel, self._residency = parallel, residency
        self._embedding = Embedding(model.device, model.weights.embedding)

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
        stage.begin(stream, chunk.num_tokens)
        own = buffers.own(chunk.own)
        rows = PrefillRows(model, self._parallel, stage, chunk, buffers, own, self._residency)
        for blocks in self._blocks:
            for block in blocks:
                block.run(rows)
            progress.submitted(stream)
        stage.end(stream)
        if self._residency is not None and chunk.own:
            self._residency.note_tokens(stream, chunk.own)
        progress.wait()
        return chunk


def kv_parts(cache: GpuKvCache, chunk: Chunk, layer: int) -> list[KvPart]:
    """One layer's keys and values of the chunk's tokens, for ``share_kv``."""
    return [KvPart(*cache.halves(span.slot, layer), span.start, span.end) for span in chunk.spans]


def exchange_rows(
    stream: Stream, parallel: Parallel, buffers: Buffers, num_tokens: int
) -> tuple[Callable[[], None], ...]:
    """What ranks exchange in a layer with experts, in order: three before the experts, one behind them."""
    b, count = buffers, num_tokens

    def add() -> None:
        if b.partial is not None:
            parallel.scatter_sum(stream, b.partial, b.hidden, count, scratch=b.gathered_x)

    return (
        lambda: parallel.gather_tokens(stream, b.x, b.gathered_x, count),
        lambda: parallel.gather_tokens(stream, b.weights, b.gathered_weights, count),
        lambda: parallel.gather_ids(stream, b.ids, b.gathered_ids, count),
        add,
    )


def router_product(stream: Stream, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out f32 [T, experts] = x f32 [T, k] x weight [experts, k]^T, in f32: a router's near-ties are decided
    by it."""

    def action(_: int) -> None:
        torch.mm(x, weight.float().t(), out=out)

    stream.launch("router", action, reads=(x, weight), writes=(out,))
