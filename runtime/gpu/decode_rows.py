"""The rows of decode: one token of each of a few sequences, in a graph that is captured once and replayed
with other tokens, positions and slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.attention import GpuAttention
from krasis.runtime.gpu.blocks.experts import GpuExperts
from krasis.runtime.gpu.blocks.gated_delta import GpuGatedDelta
from krasis.runtime.gpu.blocks.latent import GpuLatentAttention
from krasis.runtime.gpu.blocks.rows import packed
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.experts.handover import Handover
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.experts.stage import Step
from krasis.runtime.gpu.kernels.attention_rows import CacheRows
from krasis.runtime.gpu.kernels.gated_delta import DeltaRows
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.kv_cache import ITEM_BYTES
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.weights import GpuInt8


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """``PassRows`` of decode. table i64 [rows, 3]: as ``CacheRows`` has it. gpu_ids, cpu_ids i32 [rows,
    top_k]: the choice, where the GPU or the CPU has the expert. executed i64 [1]: slots that the GPU
    computed. handover: None if every expert is resident; residency: None if none ever is.
    """

    model: GpuModel
    product_of_experts: ExpertProduct
    own: Buffers
    table: torch.Tensor
    attention_workspace: torch.Tensor
    gpu_ids: torch.Tensor
    cpu_ids: torch.Tensor
    executed: torch.Tensor
    handover: Handover | None
    residency: Residency | None

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

    def apply_delta(self, block: GpuGatedDelta, gates: torch.Tensor, out: torch.Tensor) -> None:
        """See ``PassRows``."""
        b, cache, mixer = self.own, self.model.cache, block.form.mixer
        projected, mixed = packed(b.qkv, block.qkvz.num_rows), packed(b.delta_mixed, mixer.conv_channels)
        self.product(b.x, block.qkvz, projected)
        place = DeltaRows(self.table, (cache.memory,), *cache.state_offsets(block.layer))
        self.model.kernels.gated_delta(self.stream, projected, gates, block.form, place, mixed, out)

    def attend_latent(
        self, block: GpuLatentAttention, q: torch.Tensor, kv: torch.Tensor, attended: torch.Tensor
    ) -> None:
        """See ``PassRows``."""
        place = self._place(block.layer)
        block.store(self.stream, q, kv, place)
        block.absorb(self.stream, self.own, q, place, attended)

    def _place(self, layer: int) -> CacheRows:
        """Where a layer keeps what it keeps of the rows."""
        cache = self.model.cache
        part = cache.part(layer)
        keys, values = part.keys * ITEM_BYTES, part.values * ITEM_BYTES
        return CacheRows(self.table, (cache.memory,), keys, values, cache.capacity)

    def route(self, block: GpuExperts) -> None:
        """See ``PassRows``. The CPU's experts begin."""
        b, kernels, residency = self.own, self.model.kernels, self.residency
        if residency is None:
            kernels.route(self.stream, b.router_logits, block.router, b.ids, b.weights, block.vectors)
        else:
            kernels.route(
                self.stream, b.router_logits, block.router, b.ids, b.weights, block.vectors,
                resident=residency.mask[block.index], gpu_ids=self.gpu_ids, cpu_ids=self.cpu_ids,
                counts=residency.counts[block.index],
            )  # fmt: skip
        if self.handover is not None:
            ids = b.ids if residency is None else self.cpu_ids
            self.handover.send(self.stream, block.index, b.normed, ids, b.weights)

    def run_experts(self, block: GpuExperts) -> None:
        """See ``PassRows``: the GPU's own, then the CPU's result."""
        if self.residency is not None:
            self._run_residents(block, self.residency)
        if self.handover is not None:
            self.handover.receive(self.stream, block.index, self.own.hidden)

    def _run_residents(self, block: GpuExperts, residency: Residency) -> None:
        b, product = self.own, self.product_of_experts
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
        product.align(self.stream, step, b.routing.view(len(b.hidden)))
        table = residency.table[block.index]
        num_experts = self.model.shape.num_experts
        product.run(self.stream, step, table, (), 0, num_experts, self.executed, block.index)
        product.reduce(self.stream, step)
