"""The index over tokens (DSA) on a GPU: what it keeps of a token, and which tokens a query attends to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from krasis.formats.models.mixers import LatentAttention
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.latent_rows import LatentRows
from krasis.runtime.gpu.blocks.rows import PassRows, packed
from krasis.runtime.gpu.kernels.attention_rows import CachePlace, CacheRows
from krasis.runtime.gpu.kernels.index import IndexForm, score_columns

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuIndex:
    """A layer's own. norm: of what the layer reads; query_norm: of its queries' latents. What an index makes
    of rows is float32, of some rows at a time: near-ties are decided by it."""

    def __init__(
        self,
        model: GpuModel,
        layer: int,
        mixer: LatentAttention,
        norm: torch.Tensor,
        query_norm: torch.Tensor,
    ) -> None:
        weights, index = model.weights.layers[layer], mixer.selection
        if index is None:
            raise TypeError("the layer has no index")
        self._kernels, self._dtype, self._index = model.kernels, model.dtype, index
        self._eps, self._latent_eps = model.spec.norm.eps, mixer.latent_eps
        self._norm, self._query_norm = norm, query_norm
        self._k, self._q, self._weights = (weights.plain(f"index.{part}") for part in ("k", "q", "weights"))
        cos, sin = (None, None) if index.rope is None else model.weights.rope(index.rope)
        norms = weights.plain("index.k_norm"), weights.plain("index.k_norm.bias")
        self._form = IndexForm(index, *norms, cos, sin)
        self.dim = index.dim

    def keys(self, rows: PassRows, k: torch.Tensor) -> None:
        """k float32 [T, dim] of the pass's residual, as ``store`` takes it."""
        most = len(rows.own.index.x)
        for begin in range(0, len(k), max(1, most)):
            end = min(len(k), begin + most)
            rows.small_product(self._normed(rows, begin, end), self._k, k[begin:end])

    def store(self, stream: Stream, k: torch.Tensor, place: CachePlace | CacheRows) -> None:
        """Keeps the keys of k."""
        self._kernels.index_store(stream, k, None, self._form, place, self._dtype)

    def choose(self, rows: PassRows, part: LatentRows, place: CachePlace | CacheRows) -> None:
        """As ``store``; and the pass's ``chosen`` are what the part's rows attend to."""
        if part.k is None or part.latents is None:
            raise TypeError("the index has no rows")
        b, index, count = rows.own.index, self._index, len(part.q)
        scores = b.scores.flatten()
        ends = place.capacity if isinstance(place, CacheRows) else place.start + count
        most = max(1, min(len(b.x), scores.numel() // score_columns(ends)))
        for begin in range(0, count, most):
            end = min(count, begin + most)
            k, latents = part.k[begin:end], part.latents[begin:end]
            first, last = part.first + begin, part.first + end
            weights = packed(b.weights, index.heads)[: len(k)]
            q = packed(b.q, index.heads * index.dim)[: len(k)]
            rows.small_product(self._normed(rows, first, last), self._weights, weights)
            normed = packed(b.latents, latents.shape[1])[: len(k)]
            self._kernels.rms_norm(rows.stream, latents, self._query_norm, self._latent_eps, normed)
            rows.small_product(normed, self._q, q)
            at = place
            if isinstance(place, CachePlace):
                at = CachePlace(place.keys, place.values, place.start + begin)
            self._kernels.index_store(rows.stream, k, q, self._form, at, self._dtype)
            chosen = b.chosen[first:last]
            self._kernels.choose(rows.stream, q, weights, index, at, chosen, scores, self._dtype)

    def _normed(self, rows: PassRows, first: int, last: int) -> torch.Tensor:
        """[last - first, hidden] of rows of the residual."""
        normed = rows.own.index.x[: last - first]
        self._kernels.rms_norm(rows.stream, rows.own.hidden[first:last], self._norm, self._eps, normed)
        return normed
