"""Checked calls of the native gated delta rule, and of gates; see ``kernels``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import GatedDelta
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native import GATE_CODES, GatedDeltaArgs
from krasis.runtime.cpu.native_arrays import F32, Array, out_pointer, pointer, shape_2d
from krasis.runtime.cpu.spans import Spans


@dataclass(frozen=True, slots=True)
class DeltaPlace:
    """Where a layer's state lies in the memory of a slot's keys; end_bytes: where it ends."""

    matrices_offset_bytes: int
    columns_offset_bytes: int
    end_bytes: int


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """float32. conv: [conv_width, channels], the oldest token's first. rates, dt_bias: [value_heads].
    gate_norm: [value_dim], with its eps.
    """

    conv: Array
    rates: Array
    dt_bias: Array
    gate_norm: Array
    eps: float


def gated_delta(
    kernels: Kernels,
    x: Array,
    gates: Array,
    mixer: GatedDelta,
    weights: DeltaWeights,
    spans: Spans,
    place: DeltaPlace,
    out: Array,
) -> None:
    """out float32 [T, value_heads * value_dim] of x float32 [T, ldx], rows of q, k, v, z, and gates float32
    [T, 2 value_heads], b and a; both are overwritten, and so is the state of the spans' slots.
    """
    tokens, ldx = shape_2d(x, "gated_delta.x")
    heads, channels = mixer.value_heads, mixer.conv_channels
    need = channels + heads * mixer.value_dim
    if ldx < need:
        raise NativeError("too few columns", where="gated_delta.x", got=ldx, limit=need)
    if place.end_bytes > spans.keys_bytes:
        raise NativeError(
            "the layer's state ends outside of the slot's memory",
            where="gated_delta",
            got=place.end_bytes,
            limit=spans.keys_bytes,
        )
    args = GatedDeltaArgs(
        x=out_pointer(x, (tokens, ldx), F32, "gated_delta.x"),
        ldx=ldx,
        tokens=tokens,
        key_heads=mixer.key_heads,
        value_heads=heads,
        key_dim=mixer.key_dim,
        value_dim=mixer.value_dim,
        conv_width=mixer.conv_width,
        gates=out_pointer(gates, (tokens, 2 * heads), F32, "gated_delta.gates"),
        conv=pointer(weights.conv, (mixer.conv_width, channels), F32, "gated_delta.conv"),
        rates=pointer(weights.rates, (heads,), F32, "gated_delta.rates"),
        dt_bias=pointer(weights.dt_bias, (heads,), F32, "gated_delta.dt_bias"),
        gate_norm=pointer(weights.gate_norm, (mixer.value_dim,), F32, "gated_delta.gate_norm"),
        eps=weights.eps,
        gate=GATE_CODES[mixer.gate],
        spans=spans.address,
        num_spans=spans.max_spans,
        matrices_offset_bytes=place.matrices_offset_bytes,
        columns_offset_bytes=place.columns_offset_bytes,
        out=out_pointer(out, (tokens, heads * mixer.value_dim), F32, "gated_delta.out"),
    )
    kernels.call("krasis_gated_delta", (ctypes.byref(args),), x, gates, weights, spans, out)


def gate_rows(kernels: Kernels, x: Array, gates: Array, kind: str = "sigmoid") -> None:
    """x *= sigmoid (or silu) of gates, both float32 [T, k]; k % 16 == 0."""
    tokens, k = shape_2d(x, "gate_rows.x")
    arguments = (
        out_pointer(x, (tokens, k), F32, "gate_rows.x"),
        pointer(gates, (tokens, k), F32, "gate_rows.gates"),
        tokens,
        k,
        GATE_CODES[kind],
    )
    kernels.call("krasis_gate_rows", arguments, x, gates)
