"""One pass of a chunk of tokens through the model: the loop over the layers, on one rank.

Every step only enqueues; the host meets the device when the logits are read (and where a stage needs its
choice of experts). The module docstring of ``distributed/parallel.py`` says what is exchanged where; with one
rank that is nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from krasis.formats.architecture_record import Architecture
from krasis.formats.models.mlps import Router
from krasis.runtime.backend import LayerProgress, TokenIds
from krasis.runtime.cpu.kernels import Heads
from krasis.runtime.device.api import Device, Event, Stream
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.experts.stage import ExpertStage, Step
from krasis.runtime.gpu.kernels.attention import attend
from krasis.runtime.gpu.kernels.attention_rows import CachePlace, QkvForm
from krasis.runtime.gpu.kernels.embedding import Embedding
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels
from krasis.runtime.gpu.kernels.many_rows import ManyRows
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.gpu.weights import GpuLayer, GpuWeights


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A model on a device: what every pass reads. many_rows: products of prefill's many tokens. stream: of
    all compute."""

    architecture: Architecture
    device: Device
    kernels: GpuKernels
    many_rows: ManyRows
    weights: GpuWeights
    cache: GpuKvCache
    heads: Heads
    dtype: torch.dtype
    stream: Stream


@dataclass(frozen=True, slots=True)
class Chunk:
    """num_tokens tokens from position start. This rank computes `own` of them, in the ranges `segments`
    (ascending).
    """

    start: int
    num_tokens: int
    segments: tuple[tuple[int, int], ...]
    own: int

    def rows(self) -> list[tuple[int, int, int]]:
        """(first row, one past the last, position of the first) of each segment in local buffers."""
        found, row = [], 0
        for begin, end in self.segments:
            found.append((row, row + end - begin, self.start + begin))
            row += end - begin
        return found


class PassProgress:
    """Tells how many layers are done, though all are submitted long before."""

    def __init__(self, callback: LayerProgress | None, num_layers: int) -> None:
        self._callback, self._num_layers = callback, num_layers
        self._running: deque[Event] = deque()
        self._num_done = 0

    def submitted(self, stream: Stream) -> None:
        """A layer is, to that stream."""
        if self._callback is None:
            return
        self._running.append(stream.record())
        while self._running and self._running[0].is_done():
            self._next()

    def wait(self) -> None:
        """Returns when the last layer is done."""
        while self._running:
            self._running[0].synchronize()
            self._next()

    def _next(self) -> None:
        self._running.popleft()
        self._num_done += 1
        if self._callback is not None:
            self._callback(self._num_done, self._num_layers)


class PrefillPass:
    """Runs chunks, one at a time. residency: is told how often each expert was chosen."""

    def __init__(self, model: GpuModel, parallel: Parallel, residency: Residency | None = None) -> None:
        self._model, self._parallel, self._residency = model, parallel, residency
        self._embedding = Embedding(model.device, model.weights.embedding)

    def run(
        self,
        tokens: TokenIds,
        start: int,
        buffers: Buffers,
        stage: ExpertStage,
        layer_done: LayerProgress | None = None,
    ) -> Chunk:
        """From the tokens to the last layer's output in buffers.hidden; keys and values of start.. in the
        cache. With layer_done the host waits for the last layer here."""
        progress = PassProgress(layer_done, self._model.architecture.num_layers)
        model, parallel = self._model, self._parallel
        stream, count = model.stream, len(tokens)
        chunk = Chunk(start, count, parallel.own_segments(count), parallel.own_tokens(count))
        if self._residency is not None:
            self._residency.prepare(stream)
        # Embeddings first: behind the first experts, which the stage sends for at once, they would wait their
        # turn on the link, and everything else for them.
        self._embedding.run(stream, tokens, chunk.segments, buffers)
        stage.begin(stream, count)
        for index, layer in enumerate(model.weights.layers):
            self._attend(index, layer, chunk, buffers)
            self._route(index, layer, chunk, buffers)
            self._run_experts(index, chunk, buffers, stage)
            progress.submitted(stream)
        stage.end(stream)
        if self._residency is not None and chunk.own:
            self._residency.note_tokens(stream, chunk.own)
        progress.wait()
        return chunk

    def _attend(self, index: int, layer: GpuLayer, chunk: Chunk, buffers: Buffers) -> None:
        """hidden += output(attention(norm(hidden))) of the own tokens."""
        m, own = self._model, chunk.own
        stream, kernels, eps = m.stream, m.kernels, m.architecture.rms_norm_eps
        keys, values = m.cache.keys[index], m.cache.values[index]
        hidden, x, qkv = buffers.hidden[:own], buffers.x[:own], buffers.qkv[:own]
        if own:
            kernels.rms_norm(stream, hidden, layer.attention_norm, eps, x)
            m.many_rows.dense_product(stream, x, layer.qkv.codes, layer.qkv.scales, qkv)
        for first, last, position in chunk.rows():
            form = QkvForm(eps, m.weights.cos, m.weights.sin, layer.q_norm, layer.k_norm)
            place = CachePlace(keys, values, position)
            kernels.qk_norm_rope_store(stream, qkv[first:last], m.heads, form, place)
        self._parallel.share_kv(stream, keys, values, chunk.start, chunk.num_tokens)
        for first, last, position in chunk.rows():
            attend(stream, m.heads, qkv[first:last], keys, values, position, buffers.attended[first:last])
        if own:
            attended, output = buffers.attended[:own], layer.output
            m.many_rows.dense_product(stream, attended, output.codes, output.scales, hidden, residual=hidden)

    def _route(self, index: int, layer: GpuLayer, chunk: Chunk, buffers: Buffers) -> None:
        """x, ids, weights of the own tokens, then of all."""
        m, own, parallel = self._model, chunk.own, self._parallel
        stream, kernels, eps = m.stream, m.kernels, m.architecture.rms_norm_eps
        if own:
            hidden, normed, logits = buffers.hidden[:own], buffers.normed[:own], buffers.router_logits[:own]
            kernels.rms_norm(stream, hidden, layer.experts_norm, eps, normed)
            kernels.rms_norm(stream, hidden, layer.experts_norm, eps, buffers.x[:own])
            router_product(stream, normed, layer.router, logits)
            counts = None if self._residency is None else self._residency.counts[index]
            ids, weights = buffers.ids[:own], buffers.weights[:own]
            kernels.route(stream, logits, softmax_router(m.architecture), ids, weights, counts=counts)
        parallel.gather_tokens(stream, buffers.x, buffers.gathered_x, chunk.num_tokens)
        parallel.gather_tokens(stream, buffers.weights, buffers.gathered_weights, chunk.num_tokens)
        parallel.gather_ids(stream, buffers.ids, buffers.gathered_ids, chunk.num_tokens)

    def _run_experts(self, index: int, chunk: Chunk, buffers: Buffers, stage: ExpertStage) -> None:
        stream = self._model.stream
        step = Step(
            normed=buffers.normed,
            x=buffers.gathered_x,
            ids=buffers.gathered_ids,
            weights=buffers.gathered_weights,
            hidden=buffers.hidden,
            partial=buffers.partial,
            buffers=buffers,
            num_tokens=chunk.num_tokens,
        )
        stage.run(stream, index, step)
        if buffers.partial is not None:
            self._parallel.scatter_sum(
                stream, buffers.partial, buffers.hidden, chunk.num_tokens, scratch=buffers.gathered_x
            )


def softmax_router(architecture: Architecture) -> Router:
    """The router of a uniform model."""
    return Router(architecture.num_experts_per_token, renormalise=architecture.norm_topk_prob)


def router_product(stream: Stream, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out f32 [T, experts] = x f32 [T, k] x weight [experts, k]^T, in f32: a router's near-ties are decided
    by it."""

    def action(_: int) -> None:
        torch.mm(x, weight.float().t(), out=out)

    stream.launch("router", action, reads=(x, weight), writes=(out,))
