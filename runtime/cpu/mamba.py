"""Mamba-2 on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import Mamba2
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.mamba_kernels import MambaWeights, mamba2
from krasis.runtime.cpu.weights import LayerWeights

if TYPE_CHECKING:
    from krasis.runtime.cpu.blocks import CpuContext, Rows


def mamba_weights(weights: LayerWeights, eps: float) -> MambaWeights:
    """A layer's small tensors as the kernels take them."""
    return MambaWeights(
        conv=np.ascontiguousarray(weights.vector("mamba.conv").T),
        conv_bias=weights.optional_vector("mamba.conv.bias"),
        rates=np.exp(weights.vector("mamba.a_log")),
        dt_bias=weights.vector("mamba.dt_bias"),
        skip=weights.vector("mamba.d"),
        gate_norm=weights.vector("mamba.gate_norm"),
        eps=eps,
    )


class CpuMamba2:
    """hidden += output(scan(norm(hidden)))."""

    def __init__(self, context: CpuContext, index: int, mixer: Mamba2, weights: LayerWeights) -> None:
        place = context.fixed[index]
        if place is None:
            raise NativeError("the state has no place for this layer", where="Mamba-2", got=index)
        self._context, self._mixer, self._place = context, mixer, place
        self._norm = weights.vector("attention.norm")
        self._input, self._output = weights.int8("mamba.input"), weights.int8("mamba.output")
        self._dt = weights.matrix("mamba.dt").data
        self._weights = mamba_weights(weights, context.spec.norm.eps)
        buffers = context.buffers
        buffers.reserve("normed", context.spec.hidden)
        buffers.reserve("wide", self._input.num_rows)
        buffers.reserve("delta_gates", mixer.heads)
        buffers.reserve("attended", mixer.inner)
        buffers.reserve_acts(mixer.inner)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        context, buffers, mixer = self._context, self._context.buffers, self._mixer
        acts = buffers.acts(rows.num, context.spec.hidden)
        normed = buffers.rows("normed", rows.num, context.spec.hidden)
        projected = buffers.rows("wide", rows.num, self._input.num_rows)
        steps = buffers.rows("delta_gates", rows.num, mixer.heads)
        out, out_acts = buffers.rows("attended", rows.num, mixer.inner), buffers.acts(rows.num, mixer.inner)
        kernels.rms_norm(rows.hidden, self._norm, context.spec.norm.eps, normed, acts)
        kernels.gemm_int8_rows(acts, self._input.codes, self._input.scales, projected)
        kernels.gemm_float(normed, self._dt, steps)
        mamba2(kernels, projected, steps, mixer, self._weights, rows.spans, self._place, out)
        kernels.quantize(out, out_acts)
        output = self._output
        kernels.gemm_int8_rows(out_acts, output.codes, output.scales, rows.hidden, accumulate=True)
