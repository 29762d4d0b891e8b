"""Compressed attention (CSA, HCA) on the CPU: products by native kernels, what lies between them in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from krasis.formats.models.mixers import CompressedAttention
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.block_input import BlockInput
from krasis.runtime.cpu.compressed_core import CompressedCore, Projected
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.latent_kernels import gemm_int8_heads
from krasis.runtime.cpu.weights import Int8Weight, LayerWeights

if TYPE_CHECKING:
    from krasis.runtime.cpu.blocks import CpuContext, Rows

FloatArray = npt.NDArray[np.float32]


class CpuCompressedAttention:
    """hidden += output(attention(norm(hidden))), the output in groups of heads first."""

    def __init__(
        self, context: CpuContext, index: int, mixer: CompressedAttention, weights: LayerWeights
    ) -> None:
        self._context, self._mixer, self._weights = context, mixer, weights
        self._input = BlockInput(weights, "attention.norm", context.spec.norm.eps)
        tables, eps = context.ropes[mixer.rope], context.spec.norm.eps
        self._core = CompressedCore(context.store, index, mixer, weights, tables, eps)
        self._width = mixer.heads * mixer.head_dim
        self._raw = self._raw_names()
        self._reserve()

    def _raw_names(self) -> tuple[str, ...]:
        """Of the products that entries are made of, in the order in which they are kept."""
        if self._mixer.ratio is None:
            return ()
        prefixes = ("compressor",) if self._mixer.selection is None else ("compressor", "index.compressor")
        return tuple(f"{prefix}.{part}" for prefix in prefixes for part in ("kv", "gate"))

    def _reserve(self) -> None:
        mixer, buffers = self._mixer, self._context.buffers
        buffers.reserve("normed", self._context.spec.hidden)
        buffers.reserve("compressed_q_a", self._weight("q_a").num_rows)
        buffers.reserve("compressed_latent", mixer.q_rank)
        buffers.reserve("wide", self._weight("q_b").num_rows)
        buffers.reserve("compressed_kv", self._weight("kv").num_rows)
        buffers.reserve("attended", self._width)
        buffers.reserve("compressed_groups", mixer.groups * mixer.group_rank)
        for name in self._raw:
            buffers.reserve(name, len(self._weights.matrix(name).data))
        if mixer.selection is not None:
            buffers.reserve("index_q", mixer.selection.heads * mixer.selection.dim)
            buffers.reserve("index_weights", mixer.selection.heads)
        for columns in (mixer.q_rank, self._width, mixer.groups * mixer.group_rank):
            buffers.reserve_acts(columns)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        context, mixer, buffers = self._context, self._mixer, self._context.buffers
        acts = buffers.acts(rows.num, context.spec.hidden)
        normed = buffers.rows("normed", rows.num, context.spec.hidden)
        normed = self._input.read(kernels, rows.hidden, rows.mixed, acts, normed)
        projected = self._projected(kernels, acts, normed)
        attended = buffers.rows("attended", rows.num, self._width)
        current = context.current
        kernels.step("compressed attention", lambda: self._core.run(projected, current.spans, attended))
        attended_acts = buffers.acts(rows.num, self._width)
        kernels.quantize(attended, attended_acts)
        groups = buffers.rows("compressed_groups", rows.num, mixer.groups * mixer.group_rank)
        to_group, output = self._weight("output_a"), self._weight("output_b")
        by_group = attended_acts.by_head(mixer.groups)
        place = mixer.groups, groups, mixer.group_rank
        gemm_int8_heads(kernels, by_group, to_group.codes, to_group.scales, *place)
        group_acts = buffers.acts(rows.num, mixer.groups * mixer.group_rank)
        kernels.quantize(groups, group_acts)
        kernels.gemm_int8_rows(group_acts, output.codes, output.scales, rows.hidden, accumulate=True)

    def _projected(self, kernels: Kernels, acts: Acts, normed: FloatArray) -> Projected:
        """The products of normed [T, hidden], of which acts are the codes."""
        mixer, buffers, num = self._mixer, self._context.buffers, acts.tokens
        low = self._product(kernels, "q_a", acts, "compressed_q_a")
        inner, latent = buffers.acts(num, mixer.q_rank), buffers.rows("compressed_latent", num, mixer.q_rank)
        norm = self._weights.vector("attention.q_a_norm")
        kernels.rms_norm(low, norm, self._context.spec.norm.eps, latent, inner)
        q = self._product(kernels, "q_b", inner, "wide")
        kv = self._product(kernels, "kv", acts, "compressed_kv")
        raw = tuple(self._floats(kernels, name, normed, name) for name in self._raw)
        if mixer.selection is None:
            return Projected(q, kv, raw)
        index_q = self._floats(kernels, "index.q", latent, "index_q")
        return Projected(q, kv, raw, index_q, self._floats(kernels, "index.weights", normed, "index_weights"))

    def _product(self, kernels: Kernels, name: str, acts: Acts, buffer: str) -> FloatArray:
        """[T, n] of an INT8 weight, n filled up to whole strips."""
        weight = self._weight(name)
        out = self._context.buffers.rows(buffer, acts.tokens, weight.num_rows)
        kernels.gemm_int8_rows(acts, weight.codes, weight.scales, out)
        return out

    def _floats(self, kernels: Kernels, name: str, x: FloatArray, buffer: str) -> FloatArray:
        """[T, n] of a weight in its own precision."""
        weight = self._weights.matrix(name).data
        out = self._context.buffers.rows(buffer, len(x), len(weight))
        kernels.gemm_float(x, weight, out)
        return out

    def _weight(self, name: str) -> Int8Weight:
        return self._weights.int8(f"attention.{name}")
