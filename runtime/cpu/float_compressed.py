"""Compressed attention (CSA, HCA) in float32 NumPy: see ``float_blocks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from krasis.formats.models.mixers import CompressedAttention
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.compressed_core import CompressedCore, Projected
from krasis.runtime.cpu.weights import LayerWeights, to_float32

if TYPE_CHECKING:
    from krasis.runtime.cpu.float_blocks import FloatContext

FloatArray = npt.NDArray[np.float32]


class FloatCompressedAttention:
    """output(attention(norm(hidden))), the output in groups of heads first."""

    def __init__(
        self, context: FloatContext, index: int, mixer: CompressedAttention, weights: LayerWeights
    ) -> None:
        self._context, self._index, self._mixer, self._weights = context, index, mixer, weights
        tables, eps = context.ropes[mixer.rope], context.spec.norm.eps
        self._core = CompressedCore(context.store, index, mixer, weights, tables, eps)

    def run(self, hidden: FloatArray, spans: tuple[Span, ...]) -> FloatArray:
        """What the block adds to hidden [T, hidden]."""
        mixer, num = self._mixer, len(hidden)
        normed = self._context.block_input(hidden, self._weights, "attention.norm")
        width = mixer.heads * mixer.head_dim
        attended = np.empty((num, width), np.float32)
        self._core.run(self._projected(normed), spans, attended)
        grouped = attended.reshape(num, mixer.groups, -1).transpose(1, 0, 2)
        to_group = self._dense("output_a", mixer.groups * mixer.group_rank)
        to_group = to_group.reshape(mixer.groups, mixer.group_rank, -1)
        middle = (grouped @ to_group.transpose(0, 2, 1)).transpose(1, 0, 2).reshape(num, -1)
        return reference.gemm(middle, self._dense("output_b", self._context.spec.hidden))

    def _projected(self, normed: FloatArray) -> Projected:
        mixer, weights = self._mixer, self._weights
        latent = reference.gemm(normed, self._dense("q_a", mixer.q_rank))
        latent = reference.rms_norm(latent, weights.vector("attention.q_a_norm"), self._context.spec.norm.eps)
        q = reference.gemm(latent, self._dense("q_b", mixer.heads * mixer.head_dim))
        kv = reference.gemm(normed, self._dense("kv", mixer.head_dim))
        if mixer.ratio is None:
            return Projected(q, kv)
        raw = [self._plain(f"compressor.{part}", normed) for part in ("kv", "gate")]
        if mixer.selection is None:
            return Projected(q, kv, tuple(raw))
        raw += [self._plain(f"index.compressor.{part}", normed) for part in ("kv", "gate")]
        index_q = self._plain("index.q", latent)
        return Projected(q, kv, tuple(raw), index_q, self._plain("index.weights", normed))

    def _plain(self, name: str, x: FloatArray) -> FloatArray:
        weight = self._weights.matrix(name)
        return reference.gemm(x, to_float32(weight.data, weight.dtype))

    def _dense(self, name: str, rows: int) -> FloatArray:
        return self._context.dense(self._index, self._weights, f"attention.{name}")[:rows]
