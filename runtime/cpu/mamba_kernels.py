"""A checked call of the native Mamba-2 scan; see ``kernels``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import Mamba2
from krasis.runtime.cpu.delta_kernels import DeltaPlace
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import F32, Array, out_pointer, pointer, shape_2d
from krasis.runtime.cpu.spans import Spans


class Mamba2Args(ctypes.Structure):
    """``krasis_mamba2_args``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("ldx", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("state_dim", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("conv_width", ctypes.c_int64),
        ("steps", ctypes.c_void_p),
        ("conv", ctypes.c_void_p),
        ("conv_bias", ctypes.c_void_p),
        ("rates", ctypes.c_void_p),
        ("dt_bias", ctypes.c_void_p),
        ("skip", ctypes.c_void_p),
        ("gate_norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("min_step", ctypes.c_float),
        ("spans", ctypes.c_void_p),
        ("num_spans", ctypes.c_int64),
        ("matrices_offset_bytes", ctypes.c_int64),
        ("columns_offset_bytes", ctypes.c_int64),
        ("out", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class MambaWeights:
    """float32. conv: [conv_width, channels], the oldest token's first; conv_bias: [channels] or None. rates,
    dt_bias, skip: [heads]. gate_norm: [heads * head_dim], with its eps.
    """

    conv: Array
    conv_bias: Array | None
    rates: Array
    dt_bias: Array
    skip: Array
    gate_norm: Array
    eps: float


def mamba2(
    kernels: Kernels,
    x: Array,
    steps: Array,
    mixer: Mamba2,
    weights: MambaWeights,
    spans: Spans,
    place: DeltaPlace,
    out: Array,
) -> None:
    """out float32 [T, heads * head_dim] of x float32 [T, ldx], rows of z, x, B, C, and steps float32 [T,
    heads]; both are overwritten, and so is the state of the spans' slots.
    """
    tokens, ldx = shape_2d(x, "mamba2.x")
    heads, channels, need = mixer.heads, mixer.conv_channels, mixer.inner + mixer.conv_channels
    if ldx < need:
        raise NativeError("too few columns", where="mamba2.x", got=ldx, limit=need)
    if place.end_bytes > spans.keys_bytes:
        raise NativeError(
            "the layer's state ends outside of the slot's memory",
            where="mamba2",
            got=place.end_bytes,
            limit=spans.keys_bytes,
        )
    bias = weights.conv_bias
    args = Mamba2Args(
        x=out_pointer(x, (tokens, ldx), F32, "mamba2.x"),
        ldx=ldx,
        tokens=tokens,
        heads=heads,
        head_dim=mixer.head_dim,
        state_dim=mixer.state_dim,
        groups=mixer.groups,
        conv_width=mixer.conv_width,
        steps=out_pointer(steps, (tokens, heads), F32, "mamba2.steps"),
        conv=pointer(weights.conv, (mixer.conv_width, channels), F32, "mamba2.conv"),
        conv_bias=None if bias is None else pointer(bias, (channels,), F32, "mamba2.conv_bias"),
        rates=pointer(weights.rates, (heads,), F32, "mamba2.rates"),
        dt_bias=pointer(weights.dt_bias, (heads,), F32, "mamba2.dt_bias"),
        skip=pointer(weights.skip, (heads,), F32, "mamba2.skip"),
        gate_norm=pointer(weights.gate_norm, (mixer.inner,), F32, "mamba2.gate_norm"),
        eps=weights.eps,
        min_step=mixer.min_step,
        spans=spans.address,
        num_spans=spans.max_spans,
        matrices_offset_bytes=place.matrices_offset_bytes,
        columns_offset_bytes=place.columns_offset_bytes,
        out=out_pointer(out, (tokens, mixer.inner), F32, "mamba2.out"),
    )
    kernels.call("krasis_mamba2", (ctypes.byref(args),), x, steps, weights, spans, out)
