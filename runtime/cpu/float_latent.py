"""Latent attention (MLA) in float32 NumPy: see ``float_blocks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from krasis.formats.models.mixers import LatentAttention
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.float_index import FloatIndex
from krasis.runtime.cpu.weights import LayerWeights

if TYPE_CHECKING:
    from krasis.runtime.cpu.float_blocks import FloatContext

FloatArray = npt.NDArray[np.float32]


class FloatLatentAttention:
    """output(attention(norm(hidden))) of latents, from which all heads' keys and values are made anew."""

    def __init__(
        self, context: FloatContext, index: int, mixer: LatentAttention, weights: LayerWeights
    ) -> None:
        self._context, self._index, self._mixer, self._weights = context, index, mixer, weights
        own = mixer.selection if mixer.index_dim else None
        self._chooser = None if own is None else FloatIndex(context, index, own, weights)

    def run(self, hidden: FloatArray, spans: tuple[Span, ...]) -> FloatArray:
        """What the block adds to hidden [T, hidden]."""
        mixer = self._mixer
        normed = self._context.block_input(hidden, self._weights, "attention.norm")
        latents = self._query_latents(normed)
        queries = self._product("q" if mixer.q_rank is None else "q_b", latents, self._query_rows)
        queries = queries.reshape(len(hidden), mixer.heads, mixer.nope_dim + mixer.rope_dim)
        kv = self._product("kv_a", normed, mixer.kv_rank + mixer.rope_dim)
        parts = []
        for s in spans:
            own = slice(s.first_row, s.end_row)
            parts.append(self._attend(queries[own], kv[own], normed[own], latents[own], s))
        return self._product("output", np.concatenate(parts), self._context.spec.hidden)

    def _product(self, name: str, x: FloatArray, rows: int) -> FloatArray:
        out = reference.gemm(x, self._matrix(name, rows))
        bias = self._weights.optional_vector(f"attention.{name}.bias")
        return out if bias is None else out + bias

    def _matrix(self, name: str, rows: int) -> FloatArray:
        return self._context.dense(self._index, self._weights, f"attention.{name}")[:rows]

    @property
    def _query_rows(self) -> int:
        return self._mixer.heads * (self._mixer.nope_dim + self._mixer.rope_dim)

    def _query_latents(self, normed: FloatArray) -> FloatArray:
        """What queries are made of: normed latents, or the normed residual itself."""
        if self._mixer.q_rank is None:
            return normed
        latent = self._product("q_a", normed, self._mixer.q_rank)
        norm = self._weights.vector("attention.q_a_norm")
        return reference.rms_norm(latent, norm, self._mixer.latent_eps)

    def _attend(
        self, q: FloatArray, kv: FloatArray, normed: FloatArray, latents: FloatArray, span: Span
    ) -> FloatArray:
        """Attention of one sequence's rows, [rows, heads * value_dim]; their latents and keys are kept."""
        context, mixer = self._context, self._mixer
        latent = reference.rms_norm(
            kv[:, : mixer.kv_rank], self._weights.vector("attention.kv_a_norm"), mixer.latent_eps
        )
        shared = kv[:, None, mixer.kv_rank :]
        nope, turned = q[..., : mixer.nope_dim], q[..., mixer.nope_dim :]
        if mixer.rope is not None:
            tables = context.ropes[mixer.rope]
            tables.ensure(span.end)
            cos, sin = tables.cos[span.start : span.end], tables.sin[span.start : span.end]
            turned, shared = (reference.rotate(x, cos, sin, mixer.rope) for x in (turned, shared))
        queries = np.concatenate([nope, turned], axis=-1)
        if mixer.temperature is not None:
            queries = queries * reference.temperatures(mixer.temperature, span.start, span.end)[:, None, None]
        rows = np.concatenate([latent, shared[:, 0]], axis=-1)[None]
        beside = rows[..., :0] if self._chooser is None else self._chooser.keys(normed, span)[None]
        kept, index_keys, _ = context.store.extend(span.slot, self._index, span.start, rows, beside)
        if self._chooser is not None:
            found = self._chooser.chosen(normed, latents, index_keys[0].astype(np.float32), span)
            context.chosen[span.slot] = found
        chosen = None if mixer.selection is None else context.chosen[span.slot]
        keys, values = self._expanded(kept[0].astype(np.float32))
        attended = reference.attention(queries, keys, values, span.start, mixer.scale, chosen=chosen)
        return attended.reshape(span.rows, mixer.heads * mixer.value_dim)

    def _expanded(self, kept: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Keys [heads, n, nope_dim + rope_dim] and values [heads, n, value_dim] of n kept tokens."""
        mixer = self._mixer
        latent, shared = kept[:, : mixer.kv_rank], kept[:, mixer.kv_rank :]
        of_keys = self._matrix("k_b", mixer.heads * mixer.kv_rank).reshape(mixer.heads, mixer.kv_rank, -1)
        of_values = self._matrix("v_b", mixer.heads * mixer.value_dim).reshape(mixer.heads, -1, mixer.kv_rank)
        alike = np.broadcast_to(shared, (mixer.heads, *shared.shape))
        return np.concatenate([latent @ of_keys, alike], axis=-1), latent @ of_values.transpose(0, 2, 1)
