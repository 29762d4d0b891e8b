"""Checked calls of the native functions for streams that small matrices mix; see ``kernels``."""

from __future__ import annotations

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import F32, Array, out_pointer, pointer, shape_2d
from krasis.runtime.cpu.stream_kernels import num_streams


def hyper_weights(
    kernels: Kernels,
    x: Array,
    mixes: Array,
    hidden: int,
    scale: Array,
    base: Array,
    *,
    norm_eps: float,
    eps: float,
    rounds: int,
) -> None:
    """mixes float32 [T, n] become weights in place: products of the flat rows of x float32 [T, streams *
    hidden], divided by the rows' rms. n: (2 + streams) streams for pre, post and comb, with scale [3] and
    rounds of Sinkhorn's iteration; or streams for pre alone, with scale [1]. base: float32 [n].
    """
    tokens, width = shape_2d(x, "hyper_weights.x")
    _, n = shape_2d(mixes, "hyper_weights.mixes")
    streams = num_streams(width, hidden, "hyper_weights.x")
    arguments = (
        pointer(x, (tokens, width), F32, "hyper_weights.x"),
        tokens,
        streams,
        hidden,
        norm_eps,
        out_pointer(mixes, (tokens, n), F32, "hyper_weights.mixes"),
        n,
        pointer(scale, (1 if n == streams else 3,), F32, "hyper_weights.scale"),
        pointer(base, (n,), F32, "hyper_weights.base"),
        eps,
        rounds,
    )
    kernels.call("krasis_hyper_weights", arguments, x, mixes, scale, base)


def hyper_sum(kernels: Kernels, x: Array, shares: Array, out: Array) -> None:
    """out [T, hidden] = the sum over streams of shares * x [T, streams * hidden]; shares [T, n], of which the
    first of a row count, or [1, streams] for all rows alike; all float32.
    """
    tokens, hidden = shape_2d(out, "hyper_sum.out")
    _, width = shape_2d(x, "hyper_sum.x")
    rows, n = shape_2d(shares, "hyper_sum.shares")
    streams = num_streams(width, hidden, "hyper_sum.x")
    if n < streams or rows not in (1, tokens):
        raise NativeError("too few shares", where="hyper_sum.shares", got=(rows, n), limit=(tokens, streams))
    arguments = (
        pointer(x, (tokens, width), F32, "hyper_sum.x"),
        tokens,
        streams,
        hidden,
        pointer(shares, (rows, n), F32, "hyper_sum.shares"),
        n if rows == tokens else 0,
        out_pointer(out, (tokens, hidden), F32, "hyper_sum.out"),
    )
    kernels.call("krasis_hyper_sum", arguments, x, shares, out)


def hyper_add(kernels: Kernels, x: Array, added: Array, weights: Array) -> None:
    """x[s] = post[s] added + sum over j of comb[j, s] x[j], by stream of x [T, streams * hidden]; added [T,
    hidden], weights [T, (2 + streams) streams] of ``hyper_weights``; all float32.
    """
    tokens, hidden = shape_2d(added, "hyper_add.added")
    _, width = shape_2d(x, "hyper_add.x")
    streams = num_streams(width, hidden, "hyper_add.x")
    arguments = (
        out_pointer(x, (tokens, width), F32, "hyper_add.x"),
        pointer(added, (tokens, hidden), F32, "hyper_add.added"),
        pointer(weights, (tokens, (2 + streams) * streams), F32, "hyper_add.weights"),
        tokens,
        streams,
        hidden,
    )
    kernels.call("krasis_hyper_add", arguments, x, added, weights)
