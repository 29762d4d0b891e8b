"""The index over tokens or pools (DSA) in float32 NumPy: see ``float_blocks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.models.selection import INDEX_NORM_EPS, Selection
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.index_reference import (
    best_pools,
    best_positions,
    index_scores,
    layer_norm,
    pool_keys,
)
from krasis.runtime.cpu.weights import LayerWeights, to_float32

if TYPE_CHECKING:
    from krasis.runtime.cpu.float_blocks import FloatContext

FloatArray = npt.NDArray[np.float32]


class FloatIndex:
    """A layer's own index. layer: its number."""

    def __init__(self, context: FloatContext, layer: int, index: Selection, weights: LayerWeights) -> None:
        self._context, self._layer, self._index, self._weights = context, layer, index, weights

    def keys(self, normed: FloatArray, span: Span) -> FloatArray:
        """[n, dim] of normed [n, hidden], as they are kept; where the index pools, with their gates."""
        k = reference.gemm(normed, self._matrix("k"))
        norm, bias = (self._weights.vector(f"index.k_norm{part}") for part in ("", ".bias"))
        own = self._turned(layer_norm(k, norm, bias, INDEX_NORM_EPS)[:, None], span)[:, 0]
        if self._index.kind != "pools":
            return own
        return np.concatenate([own, reference.gemm(normed, self._matrix("pool_gate"))], axis=1)

    def chosen(
        self, normed: FloatArray, latents: FloatArray, keys: FloatArray, span: Span
    ) -> npt.NDArray[np.bool_]:
        """[n, span.end]: the positions that rows attend to, by what is kept of so many tokens. latents: of
        queries, [n, q_rank]."""
        index = self._index
        q = reference.gemm(latents, self._matrix("q")).reshape(len(normed), index.heads, index.dim)
        weights = reference.gemm(normed, self._matrix("weights"))
        q = self._turned(q, span)
        if index.kind != "pools":
            return best_positions(index_scores(q, weights, keys), span.start, index.budget)
        scores = index_scores(q, weights, self._pools(keys, span))
        return best_pools(scores, span.start, span.end, index.budget, index.block)

    def _pools(self, kept: FloatArray, span: Span) -> FloatArray:
        """The keys of all whole pools, [n, dim]. Those that became whole are kept in place of the key of
        their last token."""
        dim, block, store = self._index.dim, self._index.block, self._context.store
        rows, place = store.layer(span.slot, self._layer)[1][0], store.places[self._layer]
        first, last = span.start // block * block, span.end // block * block
        if place is None:
            raise NativeError("the layer keeps no keys", where="index", got=self._layer)
        if first < last:
            own, positions = kept[first:last], self._weights.vector("index.pool_position")
            pooled = pool_keys(own[:, :dim], own[:, dim:], positions)
            ends = slice(first + block - 1, last, block)
            rows[ends] = place.value.kept(np.concatenate([pooled, kept[ends, dim:]], axis=1))
        found = place.value.floats(rows[block - 1 : last : block])[:, :dim]
        return found.astype(np.float32)

    def _matrix(self, name: str) -> FloatArray:
        weight = self._weights.matrix(f"index.{name}")
        return to_float32(weight.data, weight.dtype)

    def _turned(self, x: FloatArray, span: Span) -> FloatArray:
        """x [n, heads, dim] at the span's positions."""
        if self._index.rope is None:
            return x
        tables = self._context.ropes[self._index.rope]
        tables.ensure(span.end)
        rows = slice(span.start, span.end)
        return reference.rotate(x, tables.cos[rows], tables.sin[rows], self._index.rope)
