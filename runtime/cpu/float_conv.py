"""Gated short convolutions in float32 NumPy: see ``float_blocks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import ShortConv
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.delta_reference import causal_conv
from krasis.runtime.cpu.weights import LayerWeights
from krasis.runtime.state.hybrid_store import HybridStore

if TYPE_CHECKING:
    from krasis.runtime.cpu.float_blocks import FloatContext

FloatArray = npt.NDArray[np.float32]


class FloatShortConv:
    """output(c * conv(b * x)), b, c and x projections of norm(hidden)."""

    def __init__(self, context: FloatContext, index: int, mixer: ShortConv, weights: LayerWeights) -> None:
        if not isinstance(context.store, HybridStore):
            raise NativeError("the state has no place for this layer", where="short convolution", got=index)
        self._context, self._index, self._mixer, self._weights = context, index, mixer, weights
        self._store = context.store

    def run(self, hidden: FloatArray, spans: tuple[Span, ...]) -> FloatArray:
        """What the block adds to hidden [T, hidden]."""
        context, weights, channels = self._context, self._weights, self._mixer.channels
        normed = context.norm(hidden, weights.vector("attention.norm"))
        projected = reference.gemm(normed, context.dense(self._index, weights, "conv.input")[: 3 * channels])
        b, c, x = np.split(projected, 3, axis=1)
        product, taps = b * x, weights.vector("conv.conv")
        mixed = []
        for span in spans:
            _, columns = self._store.fixed(span.slot, self._index)
            if span.start == 0:
                columns[...] = 0
            mixed.append(causal_conv(product[span.first_row : span.end_row], taps, columns))
        output = context.dense(self._index, weights, "conv.output")[: context.spec.hidden]
        return reference.gemm(c * np.concatenate(mixed), output)
