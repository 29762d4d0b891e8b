"""The index over tokens or pools (DSA) on the CPU: what it keeps of a token, and which ones a query attends
to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.selection import Selection
from krasis.runtime.cpu.heads import Heads, Rotation
from krasis.runtime.cpu.index_kernels import (
    IndexNorm,
    choose,
    choose_workspace_bytes,
    chosen_workspace_bytes,
    index_store,
)
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.spans import LayerCache
from krasis.runtime.cpu.weights import LayerWeights

if TYPE_CHECKING:
    from krasis.runtime.cpu.blocks import CpuContext, Rows

CHOSEN = "chosen"
"""The buffer of what rows attend to. It outlives its block: layers without an index of their own read it."""


class CpuIndex:
    """A layer's own index. q_rank: channels of the queries' latents. cache: where its keys lie in a slot's
    values."""

    def __init__(
        self, context: CpuContext, index: Selection, q_rank: int, weights: LayerWeights, cache: LayerCache
    ) -> None:
        self._context, self._index, self._cache, self._rank = context, index, cache, q_rank
        self._norm = IndexNorm(
            weights.vector("index.k_norm"),
            weights.vector("index.k_norm.bias"),
            weights.vector("index.pool_position") if index.kind == "pools" else None,
        )
        self._gate = weights.matrix("index.pool_gate").data if index.kind == "pools" else None
        self._k, self._q, self._weights = (
            weights.matrix(f"index.{part}").data for part in ("k", "q", "weights")
        )
        self._rotation: Rotation | None = None
        if index.rope is not None:
            tables = context.ropes[index.rope]
            self._rotation = Rotation(tables.cos, tables.sin, index.rope.style)
        buffers = context.buffers
        buffers.reserve("normed", context.spec.hidden)
        buffers.reserve("index_k", index.dim)
        if self._gate is not None:
            buffers.reserve("index_gate", index.dim)
        if context.chooses(cache):
            buffers.reserve("index_latent", self._rank)
            buffers.reserve("index_q", index.heads * index.dim)
            buffers.reserve("index_weights", index.heads)

    def latent(self, num_rows: int) -> Array:
        """Where ``choose`` finds the normed latents of queries, [T, q_rank]."""
        return self._context.buffers.rows("index_latent", num_rows, self._rank)

    def store(self, kernels: Kernels, rows: Rows, normed: Array, q: Array | None = None) -> None:
        """Keeps the keys of normed [T, hidden], and gates; q [T, heads * dim] is turned in place."""
        buffers, dim, gates = self._context.buffers, self._index.dim, None
        k = buffers.rows("index_k", rows.num, dim)
        kernels.gemm_float(normed, self._k, k)
        if self._gate is not None:
            gates = buffers.rows("index_gate", rows.num, dim)
            kernels.gemm_float(normed, self._gate, gates)
        place = self._rotation, rows.spans, self._cache
        index_store(kernels, k, q, self._index, self._norm, *place, gates)

    def choose(self, kernels: Kernels, rows: Rows, normed: Array, chosen: Array) -> None:
        """As ``store``; chosen [T, most_keys]: what rows attend to by their ``latent``."""
        index, buffers = self._index, self._context.buffers
        q = buffers.rows("index_q", rows.num, index.heads * index.dim)
        weights = buffers.rows("index_weights", rows.num, index.heads)
        kernels.gemm_float(self.latent(rows.num), self._q, q)
        kernels.gemm_float(normed, self._weights, weights)
        self.store(kernels, rows, normed, q)
        choose(kernels, q, weights, index, rows.spans, self._cache, chosen, self._context.scratch)


def index_workspace_bytes(mixer: LatentAttention, num_rows: int, capacity: int, kv_dtype: str) -> int:
    """What choosing, and attention over what was chosen, need at most; they take turns."""
    index = mixer.selection
    if index is None:
        return 0
    heads = Heads(mixer.heads, 1, mixer.kv_rank + mixer.rope_dim, mixer.kv_rank)
    attending = chosen_workspace_bytes(num_rows, index.most_keys, heads, kv_dtype)
    return max(choose_workspace_bytes(num_rows, capacity), attending)
