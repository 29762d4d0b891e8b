"""Residual streams that small matrices mix (hyper-connections, mHC) in float32 NumPy: what the kernels are
measured against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.models.spec import Residual
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.float_blocks import FloatBlock, FloatContext, FloatExperts, FloatMlpBesideExperts
from krasis.runtime.cpu.weights import LayerWeights, Weight

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HyperVectors:
    """fn [(2 + streams) streams, streams * hidden], base [(2 + streams) streams], scale [3]."""

    fn: Array
    base: Array
    scale: Array


class FloatHyper:
    """A block between streams: it reads the norm of their weighed sum; each stream then is a sum of all and
    of its share of what the block adds.
    """

    def __init__(self, context: FloatContext, block: FloatBlock, weights: LayerWeights, part: str) -> None:
        if context.spec.residual is None:
            raise NativeError("the model has one residual stream", where=part)
        self.block = block
        self._residual, self._eps = context.spec.residual, context.spec.norm.eps
        self._vectors = HyperVectors(
            *(weights.vector(f"{part}.residual.{name}") for name in ("fn", "base", "scale"))
        )

    def run(
        self, hidden: FloatArray, spans: tuple[Span, ...], observe: reference.ExpertObserver | None = None
    ) -> FloatArray:
        """What is added to hidden [T, streams * hidden]. observe: see ``FloatExperts``."""
        by_stream = hidden.reshape(len(hidden), self._residual.streams, -1)
        pre, post, comb = hyper_weights(hidden, self._vectors, self._residual, self._eps)
        mixed = np.einsum("ts,tsk->tk", pre, by_stream)
        if isinstance(self.block, FloatExperts | FloatMlpBesideExperts):
            added = self.block.run(mixed, spans, observe)
        else:
            added = self.block.run(mixed, spans)
        whole = post[:, :, None] * added[:, None] + np.einsum("tjs,tjk->tsk", comb, by_stream)
        more: FloatArray = (whole - by_stream).reshape(hidden.shape)
        return more


def float_hyper_end(context: FloatContext, weights: Mapping[str, Weight], hidden: FloatArray) -> FloatArray:
    """The streams of hidden [T, streams * hidden] as one, [T, hidden], before the last norm."""
    residual = context.spec.residual
    if residual is None:
        raise NativeError("the model has one residual stream", where="final_residual")
    by_stream = hidden.reshape(len(hidden), residual.streams, context.spec.hidden)
    if residual.end == "mean":
        mean: FloatArray = by_stream.mean(axis=1)
        return mean
    fn, base, scale = (np.asarray(weights[f"final_residual.{name}"]) for name in ("fn", "base", "scale"))
    pre = _sigmoids(_products(hidden, fn, context.spec.norm.eps), scale[0], base) + residual.eps
    summed: FloatArray = np.einsum("ts,tsk->tk", pre.astype(np.float32), by_stream)
    return summed


def hyper_weights(
    hidden: Array, vectors: HyperVectors, residual: Residual, norm_eps: float
) -> tuple[Array, Array, Array]:
    """pre, post [T, streams] and comb [T, streams, streams] (from, to) of hidden [T, streams * hidden], in
    its type: mHC as its authors have it (https://arxiv.org/abs/2512.24880), with eps in each sum.
    """
    n, eps = residual.streams, np.asarray(residual.eps, hidden.dtype)
    base, scale = vectors.base, vectors.scale
    products = _products(hidden, vectors.fn, norm_eps)
    pre = _sigmoids(products[:, :n], scale[0], base[:n]) + eps
    post = 2 * _sigmoids(products[:, n : 2 * n], scale[1], base[n : 2 * n])
    logits = products[:, 2 * n :] * scale[2].astype(hidden.dtype) + base[2 * n :].astype(hidden.dtype)
    logits = logits.reshape(-1, n, n)
    comb = np.exp(logits - logits.max(axis=-1, keepdims=True))
    comb = comb / comb.sum(axis=-1, keepdims=True) + eps
    for number in range(residual.rounds):
        if number:
            comb = comb / (comb.sum(axis=-1, keepdims=True) + eps)
        comb = comb / (comb.sum(axis=-2, keepdims=True) + eps)
    return pre, post, comb


def _products(hidden: Array, fn: Array, norm_eps: float) -> Array:
    ones = np.ones(hidden.shape[1], hidden.dtype)
    return reference.gemm(reference.rms_norm(hidden, ones, norm_eps), fn)


def _sigmoids(products: Array, scale: Array, base: Array) -> Array:
    return reference.sigmoid(products * scale.astype(products.dtype) + base.astype(products.dtype))
