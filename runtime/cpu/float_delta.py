"""The delta rule with a decay of each channel (KDA) in float32 NumPy: see ``float_blocks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import ChannelDelta
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu import delta_reference as delta
from krasis.runtime.cpu.weights import LayerWeights, to_float32
from krasis.runtime.state.hybrid_store import HybridStore

if TYPE_CHECKING:
    from krasis.runtime.cpu.float_blocks import FloatContext

FloatArray = npt.NDArray[np.float32]


class FloatChannelDelta:
    """output(delta rule(norm(hidden))); decays and output gates are projections of low rank."""

    def __init__(self, context: FloatContext, index: int, mixer: ChannelDelta, weights: LayerWeights) -> None:
        if not isinstance(context.store, HybridStore):
            raise NativeError("the state has no place for this layer", where="delta rule", got=index)
        self._context, self._index, self._mixer, self._weights = context, index, mixer, weights
        self._store = context.store

    def run(self, hidden: FloatArray, spans: tuple[Span, ...]) -> FloatArray:
        """What the block adds to hidden [T, hidden]."""
        context, mixer, weights = self._context, self._mixer, self._weights
        normed = context.block_input(hidden, weights, "attention.norm")
        qkv = context.dense(self._index, weights, "delta.qkv")[: mixer.conv_channels]
        projected = reference.gemm(normed, qkv)
        betas = reference.sigmoid(self._product("beta", normed))
        decays = delta.channel_decays(
            self._product("decay_b", self._product("decay_a", normed)),
            mixer,
            weights.vector("delta.a_log"),
            weights.vector("delta.dt_bias"),
        )
        z = self._product("gate_b", self._product("gate_a", normed))
        mixed = []
        for span in spans:
            matrices, columns = self._store.fixed(span.slot, self._index)
            if span.start == 0:
                matrices[...], columns[...] = 0, 0
            own = slice(span.first_row, span.end_row)
            q, k, v = delta.mixed_heads(projected[own], mixer, weights.vector("delta.conv"), columns)
            mixed.append(delta.over_tiles(q, k, v, betas[own], decays[own], matrices))
        gate_norm, eps = weights.vector("delta.gate_norm"), context.spec.norm.eps
        gated = delta.gated_norm(np.concatenate(mixed), z, gate_norm, eps, mixer.gate)
        return reference.gemm(gated, context.dense(self._index, weights, "delta.output")[: len(hidden[0])])

    def _product(self, name: str, x: FloatArray) -> FloatArray:
        weight = self._weights.matrix(f"delta.{name}")
        return reference.gemm(x, to_float32(weight.data, weight.dtype))
