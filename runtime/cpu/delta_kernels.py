"""Checked calls of the native gated delta rule, and of gates; see ``kernels``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native import GATE_CODES, GatedDeltaArgs
from krasis.runtime.cpu.native_arrays import F32, Array, out_pointer, pointer, shape_2d
from krasis.runtime.cpu.spans import Spans
from krasis.runtime.cpu.weights import LayerWeights


@dataclass(frozen=True, slots=True)
class DeltaPlace:
    """Where a layer's state lies in the memory of a slot's keys; end_bytes: where it ends."""

    matrices_offset_bytes: int
    columns_offset_bytes: int
    end_bytes: int


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """float32. conv: [conv_width, channels], the oldest token's first. rates, dt_bias: [value_heads], of
    ``ChannelDelta`` dt_bias [value_heads * key_dim]. gate_norm: [value_dim], with its eps.
    """

    conv: Array
    rates: Array
    dt_bias: Array
    gate_norm: Array
    eps: float

    @classmethod
    def of(cls, weights: LayerWeights, eps: float) -> DeltaWeights:
        """A layer's, as bundles have them. eps: of the norm."""
        return cls(
            conv=np.ascontiguousarray(weights.vector("delta.conv").T),
            rates=np.exp(weights.vector("delta.a_log")),
            dt_bias=weights.vector("delta.dt_bias"),
            gate_norm=weights.vector("delta.gate_norm"),
            eps=eps,
        )


def gated_delta(
    kernels: Kernels,
    x: Array,
    gates: Array,
    mixer: GatedDelta | ChannelDelta,
    weights: DeltaWeights,
    spans: Spans,
    place: DeltaPlace,
    out: Array,
    decays: Array | None = None,
    z: Array | None = None,
) -> None:
    """out float32 [T, value_heads * value_dim] of x float32 [T, ldx], rows of q, k, v, z, and gates float32
    [T, 2 value_heads], b and a; both are overwritten, and so is the state of the spans' slots. Of
    ``ChannelDelta`` gates are b alone, [T, heads], and there are decays, a of [T, heads * dim], overwritten,
    and z of that shape.
    """
    tokens, ldx = shape_2d(x, "gated_delta.x")
    heads, channels = mixer.value_heads, mixer.conv_channels
    by_channel = isinstance(mixer, ChannelDelta)
    num_gates, num_biases = (heads, heads * mixer.key_dim) if by_channel else (2 * heads, heads)
    need = channels + (0 if by_channel else heads * mixer.value_dim)
    if ldx < need:
        raise NativeError("too few columns", where="gated_delta.x", got=ldx, limit=need)
    check_place(place, spans, "gated_delta")
    args = GatedDeltaArgs(
        x=out_pointer(x, (tokens, ldx), F32, "gated_delta.x"),
        ldx=ldx,
        tokens=tokens,
        key_heads=mixer.key_heads,
        value_heads=heads,
        key_dim=mixer.key_dim,
        value_dim=mixer.value_dim,
        conv_width=mixer.conv_width,
        gates=out_pointer(gates, (tokens, num_gates), F32, "gated_delta.gates"),
        conv=pointer(weights.conv, (mixer.conv_width, channels), F32, "gated_delta.conv"),
        rates=pointer(weights.rates, (heads,), F32, "gated_delta.rates"),
        dt_bias=pointer(weights.dt_bias, (num_biases,), F32, "gated_delta.dt_bias"),
        gate_norm=pointer(weights.gate_norm, (mixer.value_dim,), F32, "gated_delta.gate_norm"),
        eps=weights.eps,
        gate=GATE_CODES[mixer.gate],
        spans=spans.address,
        num_spans=spans.max_spans,
        matrices_offset_bytes=place.matrices_offset_bytes,
        columns_offset_bytes=place.columns_offset_bytes,
        out=out_pointer(out, (tokens, heads * mixer.value_dim), F32, "gated_delta.out"),
    )
    if isinstance(mixer, ChannelDelta):
        if decays is None or z is None:
            raise NativeError("decays or gates of channels are missing", where="gated_delta")
        args.decays = out_pointer(decays, (tokens, num_biases), F32, "gated_delta.decays")
        args.z = pointer(z, (tokens, heads * mixer.value_dim), F32, "gated_delta.z")
        args.lower_bound = mixer.lower_bound or 0.0
    kernels.call("krasis_gated_delta", (ctypes.byref(args),), x, gates, weights, spans, out, decays, z)


def check_place(place: DeltaPlace, spans: Spans, where: str) -> None:
    """Raises NativeError if a layer's state ends outside of the slots' memory."""
    if place.end_bytes > spans.keys_bytes:
        raise NativeError(
            "the layer's state ends outside of the slot's memory",
            where=where,
            got=place.end_bytes,
            limit=spans.keys_bytes,
        )


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
