"""The delta rule with a decay of each channel (Kimi Delta Attention) on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import ChannelDelta
from krasis.runtime.cpu.block_input import BlockInput
from krasis.runtime.cpu.delta_kernels import DeltaWeights, gated_delta
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.weights import LayerWeights

if TYPE_CHECKING:
    from krasis.runtime.cpu.blocks import CpuContext, Rows


class CpuChannelDelta:
    """hidden += output(delta rule(norm(hidden))); decays and output gates are projections of low rank."""

    def __init__(self, context: CpuContext, index: int, mixer: ChannelDelta, weights: LayerWeights) -> None:
        place = context.fixed[index]
        if place is None:
            raise NativeError("the state has no place for this layer", where="delta rule", got=index)
        self._context, self._mixer, self._place = context, mixer, place
        self._input = BlockInput(weights, "attention.norm", context.spec.norm.eps)
        self._qkv, self._output = weights.int8("delta.qkv"), weights.int8("delta.output")
        names = ("beta", "decay_a", "decay_b", "gate_a", "gate_b")
        self._small = {name: weights.matrix(f"delta.{name}").data for name in names}
        self._weights = DeltaWeights.of(weights, context.spec.norm.eps)
        self._size = mixer.heads * mixer.dim
        buffers = context.buffers
        buffers.reserve("normed", context.spec.hidden)
        buffers.reserve("wide", self._qkv.num_rows)
        buffers.reserve("attended", self._size)
        buffers.reserve_acts(self._size)
        for name, matrix in self._small.items():
            buffers.reserve(f"delta_{name}", matrix.shape[0])

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        context, buffers = self._context, self._context.buffers
        acts = buffers.acts(rows.num, context.spec.hidden)
        normed = buffers.rows("normed", rows.num, context.spec.hidden)
        projected = buffers.rows("wide", rows.num, self._qkv.num_rows)
        out, out_acts = buffers.rows("attended", rows.num, self._size), buffers.acts(rows.num, self._size)
        normed = self._input.read(kernels, rows.hidden, rows.mixed, acts, normed)
        kernels.gemm_int8_rows(acts, self._qkv.codes, self._qkv.scales, projected)
        gates = self._product(kernels, "beta", normed)
        decays = self._product(kernels, "decay_b", self._product(kernels, "decay_a", normed))
        z = self._product(kernels, "gate_b", self._product(kernels, "gate_a", normed))
        gated_delta(
            kernels, projected, gates, self._mixer, self._weights, rows.spans, self._place, out, decays, z
        )
        kernels.quantize(out, out_acts)
        codes, scales = self._output.codes, self._output.scales
        kernels.gemm_int8_rows(out_acts, codes, scales, rows.hidden, accumulate=True)

    def _product(self, kernels: Kernels, name: str, x: Array) -> Array:
        """[T, n] of one of the projections in floats."""
        weight = self._small[name]
        out = self._context.buffers.rows(f"delta_{name}", len(x), weight.shape[0])
        kernels.gemm_float(x, weight, out)
        return out
