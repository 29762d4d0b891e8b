"""The index over tokens (DSA) in float32 NumPy: see ``float_blocks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from krasis.formats.models.selection import INDEX_NORM_EPS, Selection
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.index_reference import best_positions, index_scores, layer_norm
from krasis.runtime.cpu.weights import LayerWeights, to_float32

if TYPE_CHECKING:
    from krasis.runtime.cpu.float_blocks import FloatContext

FloatArray = npt.NDArray[np.float32]


class FloatIndex:
    """A layer's own index."""

    def __init__(self, context: FloatContext, index: Selection, weights: LayerWeights) -> None:
        self._context, self._index, self._weights = context, index, weights

    def keys(self, normed: FloatArray, span: Span) -> FloatArray:
        """[n, dim] of normed [n, hidden], as they are kept."""
        k = reference.gemm(normed, self._matrix("k"))
        norm, bias = (self._weights.vector(f"index.k_norm{part}") for part in ("", ".bias"))
        return self._turned(layer_norm(k, norm, bias, INDEX_NORM_EPS)[:, None], span)[:, 0]

    def chosen(
        self, normed: FloatArray, latents: FloatArray, keys: FloatArray, span: Span
    ) -> npt.NDArray[np.bool_]:
        """[n, span.end]: the positions of keys that rows attend to. latents: of queries, [n, q_rank]."""
        index = self._index
        q = reference.gemm(latents, self._matrix("q")).reshape(len(normed), index.heads, index.dim)
        weights = reference.gemm(normed, self._matrix("weights"))
        scores = index_scores(self._turned(q, span), weights, keys)
        return best_positions(scores, span.start, index.budget)

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
