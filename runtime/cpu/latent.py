"""Latent attention (MLA) on the CPU: queries are taken to the latents, so that one key of a token serves all
heads, and what they gather of the latents is taken to values afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from krasis.formats.errors import NativeError
from krasis.formats.models.mixers import LatentAttention
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.block_input import BlockInput
from krasis.runtime.cpu.heads import Heads, Rotation
from krasis.runtime.cpu.index import CHOSEN, CpuIndex
from krasis.runtime.cpu.index_kernels import attention_chosen
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.latent_kernels import gemm_int8_heads, latent_store
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.spans import LayerCache
from krasis.runtime.cpu.weights import Int8Weight, LayerWeights

if TYPE_CHECKING:
    from krasis.runtime.cpu.blocks import CpuContext, Rows


class CpuLatentAttention:
    """hidden += output(attention(norm(hidden)))."""

    def __init__(
        self, context: CpuContext, index: int, mixer: LatentAttention, weights: LayerWeights
    ) -> None:
        cache = context.caches[index]
        if cache is None:
            raise NativeError("the layer has no cache", where="attention", got=index)
        self._context, self._mixer, self._cache, self._weights = context, mixer, cache, weights
        self._heads = Heads(mixer.heads, 1, mixer.kv_rank + mixer.rope_dim, mixer.kv_rank)
        self._rotation: Rotation | None = None
        if mixer.rope is not None:
            tables = context.ropes[mixer.rope]
            self._rotation = Rotation(tables.cos, tables.sin, mixer.rope.style)
        self._input = BlockInput(weights, "attention.norm", context.spec.norm.eps)
        self._index = self._own_index(cache)
        self._reserve()

    def _own_index(self, cache: LayerCache) -> CpuIndex | None:
        """The layer's index, if it has one that it does not take from the layer before."""
        mixer = self._mixer
        if mixer.selection is None or mixer.q_rank is None or not mixer.index_dim:
            return None
        return CpuIndex(self._context, mixer.selection, mixer.q_rank, self._weights, cache)

    def _reserve(self) -> None:
        mixer, buffers = self._mixer, self._context.buffers
        names = ("kv_a", "q") if mixer.q_rank is None else ("kv_a", "q_a", "q_b")
        for name in names:
            buffers.reserve(f"latent_{name}", self._weight(name).num_rows)
        if mixer.q_rank is not None:
            buffers.reserve_acts(mixer.q_rank)
        buffers.reserve("wide", self._heads.attention_size)
        buffers.reserve("attended", self._heads.output_size)
        buffers.reserve("latent_values", mixer.heads * mixer.value_dim)
        buffers.reserve_acts(mixer.heads * mixer.nope_dim)
        buffers.reserve_acts(self._heads.output_size)
        buffers.reserve_acts(mixer.heads * mixer.value_dim)
        if mixer.selection is not None and self._context.chooses(self._cache):
            buffers.reserve(CHOSEN, mixer.selection.most_keys)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        context, mixer, heads, buffers = self._context, self._mixer, self._heads, self._context.buffers
        acts = buffers.acts(rows.num, context.spec.hidden)
        normed = None if self._index is None else buffers.rows("normed", rows.num, context.spec.hidden)
        self._input.read(kernels, rows.hidden, rows.mixed, acts, normed)
        kv = self._product(kernels, "kv_a", acts)
        q = self._queries(kernels, acts, rows.chooses)
        chosen = self._chosen(kernels, rows, normed)
        queries = buffers.rows("wide", rows.num, heads.attention_size)
        of_heads = buffers.acts(rows.num, mixer.heads * mixer.nope_dim).by_head(mixer.heads)
        latent_norm = self._weights.vector("attention.kv_a_norm")
        latent_store(
            kernels, q, kv, mixer, latent_norm, self._rotation, rows.spans, self._cache, of_heads, queries
        )
        to_latent, to_values = self._weight("k_b"), self._weight("v_b")
        width = heads.head_dim
        gemm_int8_heads(kernels, of_heads, to_latent.codes, to_latent.scales, mixer.heads, queries, width)
        attended = buffers.rows("attended", rows.num, heads.output_size)
        place = heads, rows.spans, self._cache, mixer.scale
        if chosen is None or mixer.selection is None:
            kernels.attention(queries, *place, attended, context.scratch)
        else:
            block = mixer.selection.block
            attention_chosen(kernels, queries, *place, chosen, attended, context.scratch, block)
        gathered = buffers.acts(rows.num, heads.output_size)
        kernels.quantize(attended, gathered)
        values = buffers.rows("latent_values", rows.num, mixer.heads * mixer.value_dim)
        by_head = gathered.by_head(mixer.heads)
        gemm_int8_heads(
            kernels, by_head, to_values.codes, to_values.scales, mixer.heads, values, mixer.value_dim
        )
        value_acts = buffers.acts(rows.num, mixer.heads * mixer.value_dim)
        kernels.quantize(values, value_acts)
        output = self._weight("output")
        kernels.gemm_int8_rows(value_acts, output.codes, output.scales, rows.hidden, accumulate=True)
        if (bias := self._weights.optional_vector("attention.output.bias")) is not None:
            kernels.add_rows(rows.hidden, bias=bias)

    def _chosen(self, kernels: Kernels, rows: Rows, normed: Array | None) -> Array | None:
        """What rows attend to where they see more than that, [T, most_keys], by the layer's index or by that
        of a layer before. The index keeps its keys in any case."""
        index, selection = self._index, self._mixer.selection
        if selection is None or not rows.chooses:
            if index is not None and normed is not None:
                index.store(kernels, rows, normed)
            return None
        chosen = self._context.buffers.rows(CHOSEN, rows.num, selection.most_keys)
        if index is not None and normed is not None:
            index.choose(kernels, rows, normed, chosen)
        return chosen

    def _queries(self, kernels: Kernels, acts: Acts, chooses: bool) -> Array:
        """[T, >= heads * (nope_dim + rope_dim)] of the normed residual. chooses: the index gets latents."""
        mixer = self._mixer
        if mixer.q_rank is None:
            return self._product(kernels, "q", acts)
        latent = self._product(kernels, "q_a", acts)
        inner = self._context.buffers.acts(acts.tokens, mixer.q_rank)
        norm = self._weights.vector("attention.q_a_norm")
        floats = None if self._index is None or not chooses else self._index.latent(acts.tokens)
        kernels.rms_norm(latent, norm, mixer.latent_eps, floats, inner)
        return self._product(kernels, "q_b", inner)

    def _product(self, kernels: Kernels, name: str, acts: Acts) -> Array:
        """[T, n] of a projection, n filled up to whole strips."""
        weight = self._weight(name)
        out = self._context.buffers.rows(f"latent_{name}", acts.tokens, weight.num_rows)
        kernels.gemm_int8_rows(acts, weight.codes, weight.scales, out)
        if (bias := self._weights.optional_vector(f"attention.{name}.bias")) is not None:
            kernels.add_rows(out, bias=bias)
        return out

    def _weight(self, name: str) -> Int8Weight:
        return self._weights.int8(f"attention.{name}")
