"""Gated short convolutions on the CPU."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import ShortConv
from krasis.runtime.cpu.delta_kernels import DeltaPlace, check_place
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native import ShortConvArgs
from krasis.runtime.cpu.native_arrays import F32, Array, out_pointer, pointer, shape_2d
from krasis.runtime.cpu.spans import Spans
from krasis.runtime.cpu.weights import LayerWeights

if TYPE_CHECKING:
    from krasis.runtime.cpu.blocks import CpuContext, Rows


class CpuShortConv:
    """hidden += output(c * conv(b * x)), b, c and x projections of norm(hidden)."""

    def __init__(self, context: CpuContext, index: int, mixer: ShortConv, weights: LayerWeights) -> None:
        place = context.fixed[index]
        if place is None:
            raise NativeError("the state has no place for this layer", where="short convolution", got=index)
        self._context, self._mixer, self._place = context, mixer, place
        self._norm = weights.vector("attention.norm")
        self._input, self._output = weights.int8("conv.input"), weights.int8("conv.output")
        self._conv = np.ascontiguousarray(weights.vector("conv.conv").T)
        context.buffers.reserve("wide", self._input.num_rows)
        context.buffers.reserve("attended", mixer.channels)
        context.buffers.reserve_acts(mixer.channels)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        context, channels, buffers = self._context, self._mixer.channels, self._context.buffers
        acts = buffers.acts(rows.num, context.spec.hidden)
        projected = buffers.rows("wide", rows.num, self._input.num_rows)
        out, out_acts = buffers.rows("attended", rows.num, channels), buffers.acts(rows.num, channels)
        kernels.rms_norm(rows.hidden, self._norm, context.spec.norm.eps, acts=acts)
        kernels.gemm_int8_rows(acts, self._input.codes, self._input.scales, projected)
        short_conv(kernels, projected, self._conv, rows.spans, self._place, out)
        kernels.quantize(out, out_acts)
        codes, scales = self._output.codes, self._output.scales
        kernels.gemm_int8_rows(out_acts, codes, scales, rows.hidden, accumulate=True)


def short_conv(kernels: Kernels, x: Array, conv: Array, spans: Spans, place: DeltaPlace, out: Array) -> None:
    """out float32 [T, channels] of x float32 [T, ldx], rows of b, c, x. conv: float32 [width, channels], the
    oldest token's first. The state of the spans' slots is overwritten.
    """
    tokens, ldx = shape_2d(x, "short_conv.x")
    width, channels = shape_2d(conv, "short_conv.conv")
    if ldx < 3 * channels:
        raise NativeError("too few columns", where="short_conv.x", got=ldx, limit=3 * channels)
    check_place(place, spans, "short_conv")
    args = ShortConvArgs(
        x=pointer(x, (tokens, ldx), F32, "short_conv.x"),
        ldx=ldx,
        tokens=tokens,
        channels=channels,
        width=width,
        conv=pointer(conv, (width, channels), F32, "short_conv.conv"),
        spans=spans.address,
        num_spans=spans.max_spans,
        columns_offset_bytes=place.columns_offset_bytes,
        out=out_pointer(out, (tokens, channels), F32, "short_conv.out"),
    )
    kernels.call("krasis_short_conv", (ctypes.byref(args),), x, conv, spans, out)
