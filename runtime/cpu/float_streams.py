"""Gated residual streams and hashed n-gram tables in float32 NumPy: what the kernels are measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.float_blocks import (
    FloatBlock,
    FloatContext,
    FloatExperts,
    FloatMlpBesideExperts,
    float_block,
)
from krasis.runtime.cpu.float_hyper import FloatHyper, float_hyper_end
from krasis.runtime.cpu.hashed_table import HashedTables
from krasis.runtime.cpu.weights import FloatWeight, LayerWeights, ModelWeights, Weight, to_float32

FloatArray = npt.NDArray[np.float32]


class FloatGate:
    """The mean of all streams of rows, each channel weighed by a low-rank gate. prefix: of its weights."""

    def __init__(self, context: FloatContext, weights: Mapping[str, Weight], prefix: str) -> None:
        residual = context.spec.residual
        if residual is None:
            raise NativeError("the model has one residual stream", where=prefix)
        self._streams, self._hidden = residual.streams, context.spec.hidden
        self._eps = context.spec.norm.eps
        parts = (weights.get(f"{prefix}.{part}") for part in ("norm", "down", "up", "inject"))
        self._norm, self._down, self._up, self._inject = (_floats(part) for part in parts)

    def mixed(self, hidden: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What a block reads of hidden [T, streams * hidden], [T, hidden], and how much of what it adds each
        stream takes, [T, streams, 1] (nothing without such weights).
        """
        shape = (len(hidden), self._streams, self._hidden)
        normed = normed_streams(hidden, self._norm, self._eps, shape)
        wide = normed.reshape(hidden.shape)
        low = reference.silu(reference.gemm(wide, self._down) / np.float32(self._streams))
        gates = reference.sigmoid(reference.gemm(low, self._up)).reshape(shape)
        mixed = (gates * normed).mean(axis=1)
        if not self._inject.size:
            return mixed, np.zeros((len(hidden), self._streams, 1), np.float32)
        logits = reference.gemm(wide, self._inject) / np.float32(self._streams)
        return mixed, 2 * reference.sigmoid(logits)[:, :, None]


class FloatStreams:
    """A block between streams: it reads their mean and adds to each as much as that takes."""

    def __init__(self, context: FloatContext, block: FloatBlock, weights: LayerWeights, part: str) -> None:
        self.block = block
        self._gate = FloatGate(context, weights.tensors, f"{part}.residual")

    def run(
        self, hidden: FloatArray, spans: tuple[Span, ...], observe: reference.ExpertObserver | None = None
    ) -> FloatArray:
        """What is added to hidden [T, streams * hidden]. observe: see ``FloatExperts``."""
        mixed, shares = self._gate.mixed(hidden)
        if isinstance(self.block, FloatExperts | FloatMlpBesideExperts):
            added = self.block.run(mixed, spans, observe)
        else:
            added = self.block.run(mixed, spans)
        return (added[:, None] * shares).reshape(hidden.shape)


class FloatHashedTable:
    """The rows of a hashed table that the last tokens choose, weighed by stream, and their convolution."""

    def __init__(
        self, context: FloatContext, tables: HashedTables, index: int, weights: LayerWeights
    ) -> None:
        self._context, self._tables, self._index, self._weights = context, tables, index, weights

    def run(self, hidden: FloatArray, spans: tuple[Span, ...]) -> FloatArray:
        """What is added to hidden [T, streams * hidden]."""
        context, weights, spec = self._context, self._weights, self._context.spec
        store, own, batch, places = self._tables.of(self._index)
        embeddings = own.embeddings(places)
        width, eps = spec.residual_width, spec.norm.eps
        shape = (len(hidden), width // spec.hidden, spec.hidden)
        keys = reference.gemm(embeddings, context.dense(self._index, weights, "ngram.key")[:width])
        values = reference.gemm(embeddings, context.dense(self._index, weights, "ngram.value")[: spec.hidden])
        keys = normed_streams(keys, weights.vector("ngram.key_norm"), eps, shape)
        queries = normed_streams(hidden, weights.vector("ngram.query_norm"), eps, shape)
        gated = table_gates(keys, queries)[:, :, None] * values[:, None]
        normed = normed_streams(gated.reshape(hidden.shape), weights.vector("ngram.conv_norm"), eps, shape)
        normed = normed.reshape(hidden.shape)
        added = gated.reshape(hidden.shape)
        taps = np.ascontiguousarray(weights.vector("ngram.conv").T)
        for span in spans:
            rows = slice(span.first_row, span.end_row)
            past = own.past(store, span.slot)
            if span.start == 0:
                past[...] = 0
            added[rows] += reference.silu(dilated(past, normed[rows], taps, own.table.dilation))
        own.remember(store, batch.tokens, spans)
        return added


LayerPart = FloatBlock | FloatStreams | FloatHyper | FloatHashedTable


def float_layer(
    context: FloatContext, tables: HashedTables, index: int, weights: LayerWeights
) -> Iterator[LayerPart]:
    """What adds to the residual in a layer, in order."""
    layer = weights.layer
    if layer.ngram:
        yield FloatHashedTable(context, tables, index, weights)
    for part, name in ((layer.mixer, "attention"), (layer.mlp, "mlp")):
        if part is None:
            continue
        block, residual = float_block(context, index, part, weights), context.spec.residual
        if residual is None:
            yield block
        else:
            around = FloatStreams if residual.kind == "gated" else FloatHyper
            yield around(context, block, weights, name)


def has_experts(
    part: LayerPart,
) -> TypeGuard[FloatExperts | FloatMlpBesideExperts | FloatStreams | FloatHyper]:
    """Whether experts are in it, whose inputs can be observed."""
    block = part.block if isinstance(part, FloatStreams | FloatHyper) else part
    return isinstance(block, FloatExperts | FloatMlpBesideExperts)


def float_end(context: FloatContext, weights: ModelWeights, hidden: FloatArray) -> FloatArray:
    """What the head reads of rows of the residual."""
    residual = context.spec.residual
    if residual is None:
        return context.norm(hidden, weights.final_norm)
    if residual.kind == "hyper":
        return context.norm(float_hyper_end(context, weights.end, hidden), weights.final_norm)
    return FloatGate(context, weights.end, "final_residual").mixed(hidden)[0]


def normed_streams(x: FloatArray, weight: FloatArray, eps: float, shape: tuple[int, int, int]) -> FloatArray:
    """x [T, streams * hidden] as shape [T, streams, hidden], normed by stream."""
    return reference.rms_norm(x.reshape(shape), weight.reshape(shape[1:]), eps)


def table_gates(keys: FloatArray, queries: FloatArray) -> FloatArray:
    """[T, streams] of keys and queries [T, streams, hidden]: sigmoids of the signed root of their product."""
    products = (keys * queries).sum(axis=-1) / np.sqrt(np.float32(keys.shape[-1]))
    return reference.sigmoid(np.sign(products) * np.sqrt(np.maximum(np.abs(products), np.float32(1e-6))))


def dilated(past: FloatArray, rows: FloatArray, taps: FloatArray, dilation: int) -> FloatArray:
    """The causal convolution of rows [T, width] after past [(taps - 1) * dilation, width], which becomes the
    past of the rows to come. taps: [num, width], that of the oldest first.
    """
    num, reach = len(rows), len(past)
    both = np.concatenate([past, rows])
    out: FloatArray = taps[-1] * rows
    for number, tap in enumerate(taps[:-1]):
        out += tap * both[number * dilation : number * dilation + num]
    past[...] = both[len(both) - reach :]
    return out


def _floats(weight: Weight | None) -> FloatArray:
    """A weight of gates in float32; empty for none."""
    if weight is None:
        return np.empty(0, np.float32)
    if isinstance(weight, FloatWeight):
        return to_float32(weight.data, weight.dtype)
    if not isinstance(weight, np.ndarray):
        raise NativeError("gates of streams are not packed", where="residual", got=type(weight).__name__)
    return weight
