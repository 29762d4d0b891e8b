"""Checked calls of the native functions for gated residual streams; see ``kernels``."""

from __future__ import annotations

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import F32, Array, out_pointer, pointer, shape_2d

CHANNEL_MULTIPLE = 16


def stream_norm(kernels: Kernels, x: Array, weight: Array, eps: float, hidden: int, out: Array) -> None:
    """out = x / rms(x) * weight by stream of ``hidden`` channels; x, out float32 [T, streams * hidden] (out
    may be x), weight float32 [streams * hidden].
    """
    tokens, width = shape_2d(x, "stream_norm.x")
    arguments = (
        pointer(x, (tokens, width), F32, "stream_norm.x"),
        tokens,
        num_streams(width, hidden, "stream_norm.x"),
        hidden,
        pointer(weight, (width,), F32, "stream_norm.weight"),
        eps,
        out_pointer(out, (tokens, width), F32, "stream_norm.out"),
    )
    kernels.call("krasis_stream_norm", arguments, x, weight, out)


def stream_squash(kernels: Kernels, x: Array, scale: float) -> None:
    """x = silu(scale x), float32 [T, k]."""
    tokens, k = shape_2d(x, "stream_squash.x")
    arguments = (out_pointer(x, (tokens, k), F32, "stream_squash.x"), tokens, k, scale)
    kernels.call("krasis_stream_squash", arguments, x)


def stream_mix(kernels: Kernels, normed: Array, gates: Array, out: Array) -> None:
    """out [T, hidden] = the mean over streams of sigmoid(gates) * normed, both [T, streams * hidden]; all
    float32.
    """
    tokens, hidden = shape_2d(out, "stream_mix.out")
    _, width = shape_2d(normed, "stream_mix.normed")
    arguments = (
        pointer(normed, (tokens, width), F32, "stream_mix.normed"),
        pointer(gates, (tokens, width), F32, "stream_mix.gates"),
        tokens,
        num_streams(width, hidden, "stream_mix.normed"),
        hidden,
        out_pointer(out, (tokens, hidden), F32, "stream_mix.out"),
    )
    kernels.call("krasis_stream_mix", arguments, normed, gates, out)


def stream_add(kernels: Kernels, x: Array, added: Array, logits: Array) -> None:
    """x [T, streams * hidden] += 2 sigmoid(logits / streams) * added; added [T, hidden], logits [T,
    streams]; all float32.
    """
    tokens, hidden = shape_2d(added, "stream_add.added")
    _, width = shape_2d(x, "stream_add.x")
    streams = num_streams(width, hidden, "stream_add.x")
    arguments = (
        out_pointer(x, (tokens, width), F32, "stream_add.x"),
        pointer(added, (tokens, hidden), F32, "stream_add.added"),
        pointer(logits, (tokens, streams), F32, "stream_add.logits"),
        tokens,
        streams,
        hidden,
    )
    kernels.call("krasis_stream_add", arguments, x, added, logits)


def num_streams(width: int, hidden: int, where: str) -> int:
    """Streams of ``hidden`` channels in a row of width. Raises NativeError if they are no whole ones."""
    if hidden < 1 or width % hidden or hidden % CHANNEL_MULTIPLE:
        limit = f"streams of {hidden} channels, a multiple of {CHANNEL_MULTIPLE}"
        raise NativeError("no whole streams", where=where, got=width, limit=limit)
    return width // hidden
