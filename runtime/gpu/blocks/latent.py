"""Latent attention (MLA) on a GPU: see ``planning.latent_workspace`` for its two ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from krasis.formats.models.mixers import LatentAttention
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.index import GpuIndex
from krasis.runtime.gpu.blocks.latent_rows import LatentRows
from krasis.runtime.gpu.blocks.rows import PassRows
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.kernels.attention_rows import CachePlace, CacheRows
from krasis.runtime.gpu.kernels.latent import LatentForm
from krasis.runtime.gpu.kernels.latent_expanded import LatentWeights, attend_expanded, fits
from krasis.runtime.planning import latent_workspace

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuLatentAttention:
    """layer: its number. form: what a pass needs to know of it. has_index: whether it may attend to some
    positions alone, which an index chose."""

    def __init__(self, model: GpuModel, layer: int, mixer: LatentAttention) -> None:
        weights = model.weights.layers[layer]
        self._kernels, self._eps, self._capacity = model.kernels, model.spec.norm.eps, model.cache.capacity
        self.layer, self._mixer = layer, mixer
        self._norm = weights.plain("attention.norm")
        self._names = ("q",) if mixer.q_rank is None else ("q_a", "q_b")
        self._weights = {name: weights.int8(f"attention.{name}") for name in (*self._names, "kv_a", "output")}
        self._bias = {name: weights.optional(f"attention.{name}.bias") for name in ("q_a", "kv_a", "output")}
        self._query_norm = None if mixer.q_rank is None else weights.plain("attention.q_a_norm")
        self._halves = LatentWeights(weights.int8("attention.k_b"), weights.int8("attention.v_b"))
        cos, sin = (None, None) if mixer.rope is None else model.weights.rope(mixer.rope)
        self.form = LatentForm(mixer, weights.plain("attention.kv_a_norm"), cos, sin)
        keeps_index = model.cache.keeps_index
        self.has_index = keeps_index and mixer.selection is not None
        self._budget = mixer.selection.budget if keeps_index and mixer.selection is not None else None
        self._index: GpuIndex | None = None
        if keeps_index and mixer.index_dim and self._query_norm is not None:
            self._index = GpuIndex(model, layer, mixer, self._norm, self._query_norm)

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b, mixer = rows.own, self._mixer
        cut = _Columns(b.qkv)
        self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.x)
        kv = self._product(rows, "kv_a", b.x, cut.floats(self._weights["kv_a"].num_rows))
        q, latents = self._queries(rows, cut)
        k = None
        if self._index is not None:
            k = cut.floats(self._index.dim)
            self._index.keys(rows, k)
        columns = mixer.heads * mixer.value_dim
        attended = b.attended.flatten()[: len(b.x) * columns].view(len(b.x), columns)
        rows.attend_latent(self, LatentRows(q, kv, k, latents), attended)
        rows.product(attended, self._weights["output"], b.hidden, residual=b.hidden)
        self._add_bias(rows.stream, "output", b.hidden)

    def store(
        self, stream: Stream, rows: LatentRows, place: CachePlace | CacheRows, *, keeps_key: bool = True
    ) -> None:
        """What is kept of the rows goes to its place, the index's key unless it is said not to; q is
        turned."""
        self._kernels.latent_store(stream, rows.q, rows.kv, self.form, place)
        if keeps_key and self._index is not None and rows.k is not None:
            self._index.store(stream, rows.k, place)

    def attend(self, rows: PassRows, part: LatentRows, place: CachePlace, out: torch.Tensor) -> None:
        """out [T, heads * value_dim] = attention of one sequence's queries: of those that see no more than an
        index picks in the way that suits as many, then of the others."""
        num_rows = len(part.q)
        dense = num_rows if self._budget is None else min(num_rows, max(0, self._budget - place.start))
        if dense:
            self._attend_all(rows.stream, rows.own, part.q[:dense], place, out[:dense])
        if dense < num_rows:
            at = CachePlace(place.keys, place.values, place.start + dense)
            self.attend_chosen(rows, part.part(dense, num_rows), at, out[dense:])

    def attend_chosen(
        self, rows: PassRows, part: LatentRows, place: CachePlace | CacheRows, out: torch.Tensor
    ) -> None:
        """out [T, heads * value_dim] = attention over what the layer's index chooses, or that of a layer
        before has chosen."""
        if self._index is not None:
            self._index.choose(rows, part, place)
        chosen = rows.own.index.chosen[part.first : part.first + len(part.q)]
        most = latent_workspace.LEAST_EXPANDED - 1
        for begin in range(0, len(part.q), most):
            own, at = slice(begin, min(len(part.q), begin + most)), place
            if isinstance(place, CachePlace):
                at = CachePlace(place.keys, place.values, place.start + begin)
            self.absorb(rows.stream, rows.own, part.q[own], at, out[own], chosen[own])

    def _attend_all(
        self, stream: Stream, buffers: Buffers, q: torch.Tensor, place: CachePlace, out: torch.Tensor
    ) -> None:
        least = latent_workspace.LEAST_EXPANDED
        room, num_keys = buffers.expanded.flatten(), place.start + len(q)
        if len(q) >= least and fits(self.form, num_keys, room):
            self._expand(stream, room, q, place, out)
            return
        for begin in range(0, len(q), least - 1):
            end = min(len(q), begin + least - 1)
            at = CachePlace(place.keys, place.values, place.start + begin)
            self.absorb(stream, buffers, q[begin:end], at, out[begin:end])

    def absorb(
        self,
        stream: Stream,
        buffers: Buffers,
        q: torch.Tensor,
        place: CachePlace | CacheRows,
        out: torch.Tensor,
        chosen: torch.Tensor | None = None,
    ) -> None:
        """out [T, heads * value_dim] = attention of a few queries over the latents themselves. chosen [T,
        budget]: which positions."""
        mixer, num_rows = self._mixer, len(q)
        heads = q[:, : self.form.query_size].view(num_rows, mixer.heads, self.form.head_dim)
        columns = mixer.heads * mixer.kv_rank
        queries = buffers.latent.flatten()[: num_rows * columns].view(num_rows, mixer.heads, mixer.kv_rank)
        to_keys, to_values = self._halves.to_keys, self._halves.to_values
        nope, rest = heads[:, :, : mixer.nope_dim], heads[:, :, mixer.nope_dim :]
        self._kernels.int8_heads(stream, nope, to_keys.codes, to_keys.scales, queries)
        if chosen is not None:
            splits = latent_workspace.latent_splits(num_rows, mixer.heads, chosen.shape[1])
        elif isinstance(place, CacheRows):
            splits = latent_workspace.latent_splits(num_rows, mixer.heads, self._capacity)
        else:  # rows of one sequence share blocks
            splits = latent_workspace.latent_splits(1, num_rows * mixer.heads, place.start + num_rows)
        workspace = buffers.latent_splits.flatten()
        self._kernels.latent_attention(stream, queries, rest, self.form, place, workspace, splits, chosen)
        values = out.view(num_rows, mixer.heads, mixer.value_dim)
        self._kernels.int8_heads(stream, queries, to_values.codes, to_values.scales, values)

    def _expand(
        self, stream: Stream, room: torch.Tensor, q: torch.Tensor, place: CachePlace, out: torch.Tensor
    ) -> None:
        mixer = self._mixer
        heads = q[:, : self.form.query_size].view(len(q), mixer.heads, self.form.head_dim)
        values = out.view(len(q), mixer.heads, mixer.value_dim)
        attend_expanded(
            self._kernels, stream, self.form, self._halves, heads, place.keys[0], place.start, values, room
        )

    def _queries(self, rows: PassRows, cut: _Columns) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, >= heads * head_dim] of ``own.x``, and their latents before the norm if they have such."""
        b, names = rows.own, self._names
        q = cut.halves(self._weights[names[-1]].num_rows)
        if self._query_norm is None:
            return self._product(rows, "q", b.x, q), None
        rank = len(self._query_norm)
        latent = self._product(rows, "q_a", b.x, cut.floats(self._weights["q_a"].num_rows))
        normed = cut.halves(rank)
        self._kernels.rms_norm(rows.stream, latent, self._query_norm, self._mixer.latent_eps, normed)
        return self._product(rows, "q_b", normed, q), latent

    def _product(self, rows: PassRows, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        rows.product(x, self._weights[name], out)
        self._add_bias(rows.stream, name, out)
        return out

    def _add_bias(self, stream: Stream, name: str, out: torch.Tensor) -> None:
        bias = self._bias.get(name)
        if bias is not None:
            self._kernels.add_rows(stream, out, None, bias=bias)


class _Columns:
    """Matrices [T, columns] without gaps, one after the other in the memory of a buffer [T, columns of all],
    16-bit or float32."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._rows, self._memory, self._end = len(buffer), buffer.flatten(), 0

    def halves(self, columns: int) -> torch.Tensor:
        """The next, 16-bit."""
        return self._next(columns).view(self._rows, columns)

    def floats(self, columns: int) -> torch.Tensor:
        """The next, float32."""
        return self._next(2 * columns).view(torch.float32).view(self._rows, columns)

    def _next(self, columns: int) -> torch.Tensor:
        begin, self._end = self._end, self._end + self._rows * columns
        return self._memory[begin : self._end]
