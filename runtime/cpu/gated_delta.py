"""The gated delta rule on the CPU (Qwen3-Next, Qwen3.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import GatedDelta
from krasis.runtime.cpu.block_input import BlockInput
from krasis.runtime.cpu.delta_kernels import DeltaWeights, gated_delta
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.state_copies import copy_states, parts_of
from krasis.runtime.cpu.weights import LayerWeights

if TYPE_CHECKING:
    from krasis.runtime.cpu.blocks import CpuContext, Rows


class CpuGatedDelta:
    """hidden += output(gated delta rule(norm(hidden)))."""

    def __init__(self, context: CpuContext, index: int, mixer: GatedDelta, weights: LayerWeights) -> None:
        place = context.fixed[index]
        if place is None:
            raise NativeError("the state has no place for this layer", where="gated delta", got=index)
        self._context, self._mixer, self._place = context, mixer, place
        self._input = BlockInput(weights, "attention.norm", context.spec.norm.eps)
        self._qkvz, self._output = weights.int8("delta.qkvz"), weights.int8("delta.output")
        self._ba = weights.matrix("delta.ba").data
        self._weights = DeltaWeights.of(weights, context.spec.norm.eps)
        self._size = mixer.value_heads * mixer.value_dim
        buffers = context.buffers
        buffers.reserve("normed", context.spec.hidden)
        buffers.reserve("wide", self._qkvz.num_rows)
        buffers.reserve("delta_gates", 2 * mixer.value_heads)
        buffers.reserve("attended", self._size)
        buffers.reserve_acts(self._size)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        context, buffers = self._context, self._context.buffers
        acts = buffers.acts(rows.num, context.spec.hidden)
        normed = buffers.rows("normed", rows.num, context.spec.hidden)
        projected = buffers.rows("wide", rows.num, self._qkvz.num_rows)
        gates = buffers.rows("delta_gates", rows.num, 2 * self._mixer.value_heads)
        out, out_acts = buffers.rows("attended", rows.num, self._size), buffers.acts(rows.num, self._size)
        normed = self._input.read(kernels, rows.hidden, rows.mixed, acts, normed)
        kernels.gemm_int8_rows(acts, self._qkvz.codes, self._qkvz.scales, projected)
        kernels.gemm_float(normed, self._ba, gates)
        for part in parts_of(rows):
            cut = slice(part.begin, part.end)
            args = (self._mixer, self._weights, part.spans, self._place)
            gated_delta(kernels, projected[cut], gates[cut], *args, out[cut])
            copy_states(kernels, rows, part, self._place, context.fixed_begin)
        kernels.quantize(out, out_acts)
        kernels.gemm_int8_rows(
            out_acts, self._output.codes, self._output.scales, rows.hidden, accumulate=True
        )
