"""The rows of decode: one token of each of a few sequences, in a graph that is captured once and replayed
with other tokens, positions and slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.attention import GpuAttention
from krasis.runtime.gpu.blocks.experts import GpuExperts
from krasis.runtime.gpu.blocks.latent import GpuLatentAttention
from krasis.runtime.gpu.blocks.latent_rows import LatentRows
from krasis.runtime.gpu.blocks.rows import StateBlock, packed
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.experts.handover import Handover
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.experts.stage import Step
from krasis.runtime.gpu.kernels.attention_rows import CacheRows
from krasis.runtime.gpu.kernels.fused import MAX_NORMED, Choice, fits_norm_route
from krasis.runtime.gpu.kernels.gated_delta import DeltaRows
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.kernels.named_slots import fits_named
from krasis.runtime.gpu.kv_ahead import KvAhead
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel_decode import RankLink
from krasis.runtime.gpu.row_tables import TokenTables
from krasis.runtime.gpu.weights import GpuInt8


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """``PassRows`` of decode. tables: where the rows' sequences are. gpu_ids, cpu_ids i32 [rows,
    top_k]: the choice, where the GPU or the CPU has the expert. executed i64 [1]: slots that the GPU
    computed. handover: None if every expert is resident; residency: None if none ever is. arrivals i32
    [1 + hidden / 64]: zeros, by which blocks of fused kernels count themselves. ranks: None if no other rank
    takes part. ahead: None if nothing that lies in the host's memory is read ahead. chooses: whether a row
    sees more than an index over tokens picks.

    One row takes fewer launches than several, with the same bits.
    """

    model: GpuModel
    product_of_experts: ExpertProduct
    own: Buffers
    tables: TokenTables
    attention_workspace: torch.Tensor
    gpu_ids: torch.Tensor
    cpu_ids: torch.Tensor
    executed: torch.Tensor
    handover: Handover | None
    residency: Residency | None
    arrivals: torch.Tensor
    ranks: RankLink | None = None
    ahead: KvAhead | None = None
    chooses: bool = False

    @property
    def stream(self) -> Stream:
        """See ``PassRows``."""
        return self.model.stream

    @property
    def takes_x(self) -> bool:
        """See ``PassRows``: the CPU's experts take the norm in f32."""
        return self.residency is not None

    def product(
        self, x: torch.Tensor, weight: GpuInt8, out: torch.Tensor, residual: torch.Tensor | None = None
    ) -> None:
        """See ``PassRows``."""
        self.model.kernels.int8_gemm(self.stream, x, weight.codes, weight.scales, out, residual=residual)

    def normed_product(self, norm: torch.Tensor, eps: float, weight: GpuInt8, out: torch.Tensor) -> None:
        """See ``PassRows``."""
        b, kernels = self.own, self.model.kernels
        if len(b.hidden) == 1 and b.hidden.shape[1] <= MAX_NORMED:
            kernels.norm_product(
                self.stream, b.hidden, norm, eps, weight.codes, weight.scales, out, b.x.dtype
            )
        else:
            kernels.rms_norm(self.stream, b.hidden, norm, eps, b.x)
            self.product(b.x, weight, out)

    def choose(self, block: GpuExperts) -> bool:
        """See ``PassRows``: of one row."""
        b, residency, index = self.own, self.residency, block.index
        num_experts, hidden_size = block.router_weight.shape
        fits = len(b.hidden) == 1 and fits_norm_route(block.router, hidden_size, num_experts)
        if not fits or block.router_norm is not None or block.norm is None or block.latent is not None:
            return False
        choice = Choice(b.router_logits, b.ids, b.weights, self.arrivals[:1])
        if residency is not None:
            choice = replace(
                choice, resident=self._holders(residency)[index], counts=residency.counts[index],
                gpu_ids=self.gpu_ids, cpu_ids=self.cpu_ids,
            )  # fmt: skip
        self.model.kernels.norm_route(
            self.stream, b.hidden, block.norm, block.eps, block.router_weight, block.router, choice,
            b.x, b.normed, block.vectors,
        )  # fmt: skip
        self._send(block)
        return True

    def x_is_ready(self) -> None:
        """See ``PassRows``: other ranks take the norm in f32."""

    def small_product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """See ``PassRows``."""
        self.model.kernels.router(self.stream, x, weight, out)

    def attend(self, block: GpuAttention, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        """See ``PassRows``."""
        kernels, place = self.model.kernels, self._place(block.layer)
        kernels.qk_norm_rope_store(self.stream, qkv, block.heads, block.form, place)
        queries = qkv[:, : block.heads.attention_size]
        kernels.attention_decode(
            self.stream, queries, block.heads, place, block.scale, attended, self.attention_workspace,
            window=block.window or 0, sinks=block.sinks,
        )  # fmt: skip
        self._attended(block.layer)

    def apply_state(self, block: StateBlock, gates: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """See ``PassRows``."""
        b, cache = self.own, self.model.cache
        projected, mixed = packed(b.qkv, block.projection.num_rows), packed(b.delta_mixed, block.num_mixed)
        self.product(b.x, block.projection, projected)
        place = DeltaRows(self.tables.device, (cache.memory,), *cache.state_offsets(block.layer))
        block.advance(self.stream, projected, gates, place, mixed, out)

    def table_parts(self, layer: int) -> Iterator[tuple[int, int, DeltaRows]]:
        """See ``PassRows``."""
        cache = self.model.cache
        yield (
            0,
            len(self.own.hidden),
            DeltaRows(self.tables.device, (cache.memory,), 0, cache.table_offset(layer)),
        )

    def attend_latent(self, block: GpuLatentAttention, rows: LatentRows, attended: torch.Tensor) -> None:
        """See ``PassRows``."""
        place = self._place(block.layer)
        if self.chooses and block.has_index:
            block.store(self.stream, rows, place, keeps_key=False)
            block.attend_chosen(self, rows, place, attended)
        else:
            block.store(self.stream, rows, place)
            block.absorb(self.stream, self.own, rows.q, place, attended)
        self._attended(block.layer)

    def _place(self, layer: int) -> CacheRows:
        """Where a layer keeps what it keeps of the rows."""
        place = None if self.ahead is None else self.ahead.place(layer)
        return self.tables.place(self.model.cache, layer) if place is None else place

    def _attended(self, layer: int) -> None:
        """What a layer keeps of the rows has been added to, and read."""
        if self.ahead is not None:
            self.ahead.put_back(self.stream, layer)

    def route(self, block: GpuExperts) -> None:
        """See ``PassRows``."""
        b, kernels, residency = self.own, self.model.kernels, self.residency
        if residency is None:
            kernels.route(self.stream, b.router_logits, block.router, b.ids, b.weights, block.vectors)
        else:
            kernels.route(
                self.stream, b.router_logits, block.router, b.ids, b.weights, block.vectors,
                resident=self._holders(residency)[block.index], gpu_ids=self.gpu_ids, cpu_ids=self.cpu_ids,
                counts=residency.counts[block.index],
            )  # fmt: skip
        self._send(block)

    def _holders(self, residency: Residency) -> torch.Tensor:
        """Which GPU has an expert, for the router."""
        return residency.mask if self.ranks is None else self.ranks.holders

    def _send(self, block: GpuExperts) -> None:
        """The other ranks' experts and the CPU's begin."""
        b = block.seen(self.own)
        if self.ranks is not None:
            self.ranks.send(self.stream, block.index, b.normed, b.ids, b.weights)
        if self.handover is not None:
            ids = b.ids if self.residency is None else self.cpu_ids
            self.handover.send(self.stream, block.index, b.normed, ids, b.weights)

    def run_experts(self, block: GpuExperts) -> None:
        """See ``PassRows``: the GPU's own, then what other ranks made, then the CPU's result."""
        hidden = block.seen(self.own).hidden
        if self.residency is not None:
            self._run_residents(block, self.residency)
        if self.ranks is not None:
            self.ranks.receive(self.stream, block.index, hidden)
        if self.ahead is not None:  # the CPU is computing
            self.ahead.fetch(self.stream, block.index)
        if self.handover is not None:
            self.handover.receive(self.stream, block.index, hidden)

    def _run_residents(self, block: GpuExperts, residency: Residency) -> None:
        b, product = block.seen(self.own), self.product_of_experts
        residency.finish()  # a captured graph waits for no event
        step = Step(
            normed=b.normed,
            x=b.x,
            ids=self.gpu_ids,
            weights=b.weights,
            hidden=b.hidden,
            partial=None,
            buffers=b,
            num_tokens=len(b.hidden),
        )
        table, routing = residency.table[block.index], b.routing.view(len(b.hidden))
        if fits_named(routing):
            product.run_token(self.stream, step, table, self.executed, block.index, self.arrivals[1:])
            return
        product.align(self.stream, step, routing)
        num_experts = self.model.shape.num_experts
        product.run(self.stream, step, table, (), 0, num_experts, self.executed, block.index)
        product.reduce(self.stream, step)
