"""The products of a range of experts over the rows routed to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from krasis.formats.layouts import ExpertFormat, ExpertRecord
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.experts.stage import Step
from krasis.runtime.gpu.kernels.gpu_kernels import ExpertMatrix, GpuKernels, Routing
from krasis.runtime.gpu.kernels.routing import PLAIN_EXPERTS, ExpertForm, NamedSlots, SlotSum
from krasis.runtime.planning.shape import AnyModel, shape_of

SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "E8M0": torch.uint8}


class ExpertProduct:
    """gate, if they have one, up and down of one model's experts. record_bytes: of one expert. forms: of each
    layer that has experts; none: plain ones.
    """

    def __init__(
        self,
        kernels: GpuKernels,
        model: AnyModel,
        layout: ExpertFormat,
        record: ExpertRecord,
        forms: Sequence[ExpertForm] = (),
    ) -> None:
        a = shape_of(model)
        self._forms = [
            _forms_of(form, gated=a.gated_experts)
            for form in (tuple(forms) or (PLAIN_EXPERTS,) * a.num_expert_layers)
        ]
        self._kernels, self._shape = kernels, a
        self.record_bytes = record.record_bytes
        scale_dtype = SCALE_DTYPES[layout.scale_dtype]
        self.w13 = ExpertMatrix(
            record.w13_codes.offset_bytes,
            record.w13_scales.offset_bytes,
            layout.group_of(a.expert_width),
            a.expert_width,
            a.expert_intermediate_size * (1 + a.gated_experts),
            scale_dtype,
        )
        self.w2 = ExpertMatrix(
            record.w2_codes.offset_bytes,
            record.w2_scales.offset_bytes,
            layout.group_of(a.expert_intermediate_size),
            a.expert_intermediate_size,
            a.expert_width,
            scale_dtype,
        )

    def align(self, stream: Stream, step: Step, routing: Routing) -> None:
        """Sorts the step's slots by expert. routing: of the step's rows."""
        self._kernels.align(stream, step.ids, routing)

    def run(
        self,
        stream: Stream,
        step: Step,
        table: torch.Tensor,
        memory: Sequence[torch.Tensor],
        begin: int,
        end: int,
        executed: torch.Tensor,
        layer: int,
    ) -> None:
        """Slots of experts [begin, end) -> buffers.slots; adds their number to executed i64 [1].

        table i64 [experts]: addresses of records, which lie in memory. layer: among those that have experts.
        """
        first, second = self._forms[layer]
        buffers, top_k = step.buffers, self._shape.num_experts_per_token
        routing = buffers.routing.view(len(step.ids))
        common = (routing, table, memory)
        self._kernels.moe_gemm(
            stream, step.x, *common, self.w13, begin, end, buffers.gated,
            gated=self._shape.gated_experts, slots_per_row=top_k, executed=None, form=first,
        )  # fmt: skip
        self._kernels.moe_gemm(
            stream, buffers.gated, *common, self.w2, begin, end, buffers.slots,
            gated=False, slots_per_row=1, executed=executed, form=second,
        )  # fmt: skip

    def run_token(
        self,
        stream: Stream,
        step: Step,
        table: torch.Tensor,
        executed: torch.Tensor,
        layer: int,
        arrivals: torch.Tensor,
    ) -> None:
        """All of one token in two launches: hidden += its experts, where they are in the table.

        As ``align``, ``run`` and ``reduce``, with the same bits. arrivals: as ``SlotSum`` has them. Only
        where ``fits_named``.
        """
        (first, second), gated = self._forms[layer], self._shape.gated_experts
        buffers, top_k = step.buffers, self._shape.num_experts_per_token
        routing = buffers.routing.view(1)
        end = routing.num_experts
        self._kernels.moe_gemm(
            stream, step.x, routing, table, (), self.w13, 0, end, buffers.gated,
            gated=gated, slots_per_row=top_k, form=first, named=NamedSlots(step.ids),
        )  # fmt: skip
        named = NamedSlots(step.ids, SlotSum(step.weights, step.hidden, arrivals))
        self._kernels.moe_gemm(
            stream, buffers.gated, routing, table, (), self.w2, 0, end, buffers.slots,
            gated=False, slots_per_row=1, executed=executed, form=second, named=named,
        )  # fmt: skip

    def reduce(self, stream: Stream, step: Step) -> None:
        """Weighted sums of the slots: added to hidden, or with several ranks written to partial."""
        residual = step.hidden if step.partial is None else None
        out = step.hidden if step.partial is None else step.partial
        self._kernels.moe_reduce(
            stream, step.buffers.slots, step.ids, step.weights, residual, out, self._shape.num_experts
        )


def _forms_of(form: ExpertForm, *, gated: bool) -> tuple[ExpertForm, ExpertForm]:
    """Of the first and the second product: one that is not gated adds its bias as the last one does."""
    first = form if gated else ExpertForm(form.activation, down_bias=form.up_bias)
    return first, ExpertForm(down_bias=form.down_bias)
