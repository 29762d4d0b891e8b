"""The experts of a prefill on the CPU: a layer's rows go to the host, its experts' sum comes back.

For prompts so short that copying experts would take longer. The host waits for each layer's rows, so nothing
is ahead of anything, but the experts that live in VRAM are computed there meanwhile.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.kernels import Acts, Kernels, moe_workspace_bytes, workspace
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.experts.host_experts import CpuTier
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.experts.resident_views import ResidentViews
from krasis.runtime.gpu.experts.stage import Step
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.planning.shape import AnyModel, shape_of


class CpuExperts:
    """An ``ExpertStage`` for one rank and up to max_tokens tokens a pass.

    The pinned rows serve both ways: the CPU's result is written where its input was, once that is quantised.
    """

    def __init__(
        self,
        device: Device,
        kernels: GpuKernels,
        product: ExpertProduct,
        model: AnyModel,
        cpu: CpuTier,
        residency: Residency | None,
        max_tokens: int,
    ) -> None:
        a = shape_of(model)
        choices = (max_tokens, a.num_experts_per_token)
        self._device, self._kernels, self._product, self._shape = device, kernels, product, a
        self._layers = cpu.layers()
        self._cpu, self._residency, self._max_tokens = cpu, residency, max_tokens
        self._views = ResidentViews(residency, a.num_expert_layers, a.num_experts)
        self._host_kernels = Kernels(cpu.pool)
        self._acts = Acts.allocate(max_tokens, a.expert_width)
        sizes = (a.expert_width, a.expert_intermediate_size, a.num_experts, a.num_experts_per_token)
        self._scratch = workspace(moe_workspace_bytes(max_tokens, *sizes))
        self._rows = device.pinned((max_tokens, a.expert_width), torch.float32)
        self._ids = device.pinned(choices, torch.int32)
        self._weights = device.pinned(choices, torch.float32)
        self._gpu_ids = device.empty(choices, torch.int32)
        self._executed = device.empty((1,), torch.int64)
        self._host_executed = device.pinned((1,), torch.int64)
        self._num_expected = self._num_on_cpu = 0

    def begin(self, stream: Stream, num_tokens: int) -> None:
        """See ``ExpertStage``."""
        if num_tokens > self._max_tokens:
            raise NativeError("too many tokens", where="CpuExperts", got=num_tokens, limit=self._max_tokens)
        executed = self._executed
        self._num_expected = self._num_on_cpu = 0
        if self._residency is not None:
            self._residency.prepare(stream)

        def clear(_: int) -> None:
            executed.zero_()

        stream.launch("clear executed", clear, reads=(), writes=(executed,))

    def run(self, stream: Stream, layer: int, step: Step) -> None:
        """See ``ExpertStage``. Returns when the CPU's part is computed, and its addition submitted."""
        count = len(step.ids)
        if step.partial is not None or len(step.normed) != count:
            raise NativeError("the CPU's experts serve one rank only", where=f"layer {layer}")
        rows, ids, weights = self._rows[:count], self._ids[:count], self._weights[:count]
        self._num_expected += ids.numel()
        stream.copy(rows, step.normed)
        stream.copy(ids, step.ids)
        stream.copy(weights, step.weights)
        arrived = stream.record()
        if self._residency is not None:
            self._run_residents(stream, layer, step, self._residency)
        arrived.synchronize()
        self._device.host_reads(rows, ids, weights)
        self._compute(layer, rows, ids, weights)
        self._kernels.add(stream, step.hidden, rows)

    def end(self, stream: Stream) -> None:
        """See ``ExpertStage``."""
        stream.copy(self._host_executed, self._executed)

    def check(self) -> None:
        """See ``ExpertStage``."""
        self._device.host_reads(self._host_executed)
        on_gpu = int(self._host_executed[0])
        if self._num_on_cpu + on_gpu != self._num_expected:
            raise NativeError(
                "not every routed expert was executed exactly once",
                where="prefill",
                got=f"{self._num_on_cpu} on the CPU + {on_gpu} on the GPU",
                limit=self._num_expected,
            )

    def abort(self) -> None:
        """See ``ExpertStage``."""

    def _compute(self, layer: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """rows = the sum of the experts that are not resident, for the rows' own content."""
        a, run = self._shape, self._host_kernels
        host_rows, acts = rows.numpy(), self._acts.view(len(rows))
        run.quantize(host_rows, acts)
        chosen = ids.numpy()
        if self._residency is not None:
            resident = self._residency.host_addresses[layer] != 0
            chosen = np.where(resident[chosen], np.int32(-1), chosen)
        self._device.host_writes(rows)
        host_rows[:] = 0
        one = self._layers[layer]
        self._num_on_cpu += run.moe(
            one.records, one.records.shape[1], self._cpu.tiles, acts, chosen, weights.numpy(), host_rows,
            a.expert_intermediate_size, a.num_experts, self._scratch, one.activation, one.biases,
        )  # fmt: skip

    def _run_residents(self, stream: Stream, layer: int, step: Step, residency: Residency) -> None:
        ids, gpu_ids, mask = step.ids, self._gpu_ids[: len(step.ids)], residency.mask[layer]

        def keep_residents(_: int) -> None:
            gpu_ids.copy_(torch.where(mask[ids.long()] != 0, ids, -1))

        stream.launch("ids of residents", keep_residents, reads=(ids, mask), writes=(gpu_ids,))
        own, product = replace(step, ids=gpu_ids), self._product
        product.align(stream, own, step.buffers.routing.view(len(ids)))
        table, num_experts = residency.table[layer], self._shape.num_experts
        residency.arrive(stream, layer)
        memory = self._views.of(layer)  # of other layers some may still be on their way
        product.run(stream, own, table, memory, 0, num_experts, self._executed, layer)
        product.reduce(stream, own)
