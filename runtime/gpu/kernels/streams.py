"""Wrappers of the kernels of gated residual streams and hashed n-gram tables."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    I64,
    aligned,
    matrix,
    pointer,
    require,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.attention_rows import ROW_WORDS
from krasis.runtime.gpu.kernels.gated_delta import DeltaPlace, DeltaRows
from krasis.runtime.gpu.kernels.launcher import Launcher, present
from krasis.runtime.gpu.kernels.native import (
    StreamAddArgs,
    StreamMixArgs,
    StreamNormArgs,
    StreamSquashArgs,
    TableAddArgs,
    TableWeighArgs,
)


class StreamKernels(Launcher):
    """T: rows of a call, wide: the channels of all streams; T = 0 launches nothing. All tensors on the
    device, contiguous, and float32 unless said; channels of a stream a multiple of 8."""

    def stream_norm(
        self, stream: Stream, x: torch.Tensor, weight: torch.Tensor, eps: float, k: int, out: torch.Tensor
    ) -> None:
        """out = x / rms(x) * weight by stream of k channels; x, out [T, wide], weight [wide] of any float."""
        where, (tokens, wide) = "stream_norm", matrix(x, "stream_norm.x")
        args = StreamNormArgs(
            x=vector_pointer(x, (tokens, wide), F32, f"{where}.x"),
            weight=vector_pointer(weight, (wide,), FLOATS, f"{where}.weight"),
            out=vector_pointer(out, (tokens, wide), F32, f"{where}.out"),
            tokens=tokens,
            streams=_streams(wide, k, where),
            k=k,
            weight_dtype=CODES[weight.dtype],
            eps=eps,
        )
        if tokens:
            self.submit(stream, where, (byref(args),), (x, weight), (out,))

    def stream_squash(self, stream: Stream, x: torch.Tensor, scale: float) -> None:
        """x = silu(scale x)."""
        where, shape = "stream_squash", matrix(x, "stream_squash.x")
        require(x.numel() % 8 == 0, "not a multiple of 8", where, x.numel(), 8)
        args = StreamSquashArgs(x=vector_pointer(x, shape, F32, where), count=x.numel(), scale=scale)
        if x.numel():
            self.submit(stream, where, (byref(args),), (x,), (x,))

    def stream_mix(
        self,
        stream: Stream,
        normed: torch.Tensor,
        gates: torch.Tensor,
        out: torch.Tensor,
        x: torch.Tensor,
        cleared: torch.Tensor | None = None,
    ) -> None:
        """out [T, k] = the mean over streams of sigmoid(gates) * normed, both [T, wide], and x [T, k] the
        same in any float; cleared [T, k] = 0."""
        where, (tokens, k), wide = (
            "stream_mix",
            matrix(out, "stream_mix.out"),
            matrix(normed, "stream_mix")[1],
        )
        shape = (tokens, wide)
        args = StreamMixArgs(
            normed=vector_pointer(normed, shape, F32, f"{where}.normed"),
            gates=vector_pointer(gates, shape, F32, f"{where}.gates"),
            tokens=tokens,
            streams=_streams(wide, k, where),
            k=k,
            out=vector_pointer(out, (tokens, k), F32, f"{where}.out"),
            x=vector_pointer(x, (tokens, k), FLOATS, f"{where}.x"),
            cleared=None
            if cleared is None
            else vector_pointer(cleared, (tokens, k), F32, f"{where}.cleared"),
            x_dtype=CODES[x.dtype],
        )
        if tokens:
            self.submit(stream, where, (byref(args),), (normed, gates), present(out, x, cleared))

    def stream_add(self, stream: Stream, x: torch.Tensor, added: torch.Tensor, logits: torch.Tensor) -> None:
        """x [T, wide] += 2 sigmoid(logits [T, streams] / streams) * added [T, k]."""
        where, (tokens, k), wide = (
            "stream_add",
            matrix(added, "stream_add.added"),
            matrix(x, "stream_add.x")[1],
        )
        streams = _streams(wide, k, where)
        args = StreamAddArgs(
            x=vector_pointer(x, (tokens, wide), F32, f"{where}.x"),
            added=vector_pointer(added, (tokens, k), F32, f"{where}.added"),
            logits=pointer(logits, (tokens, streams), F32, f"{where}.logits"),
            tokens=tokens,
            streams=streams,
            k=k,
        )
        if tokens:
            self.submit(stream, where, (byref(args),), (x, added, logits), (x,))

    def table_weigh(
        self,
        stream: Stream,
        x: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        norms: Sequence[torch.Tensor],
        eps: float,
        gated: torch.Tensor,
        normed: torch.Tensor,
    ) -> None:
        """gated [T, wide] = values [T, k] times gates by stream of keys and x [T, wide]; normed its norms by
        stream, and may be keys. norms: weights [wide] of keys, of x and of gated, of one float type."""
        where, (tokens, k), wide = (
            "table_weigh",
            matrix(values, "table_weigh.values"),
            matrix(x, "table_weigh")[1],
        )
        shape, kinds = (tokens, wide), (norms[0].dtype,)
        args = TableWeighArgs(
            x=vector_pointer(x, shape, F32, f"{where}.x"),
            keys=vector_pointer(keys, shape, F32, f"{where}.keys"),
            values=vector_pointer(values, (tokens, k), F32, f"{where}.values"),
            key_norm=vector_pointer(norms[0], (wide,), FLOATS, f"{where}.key_norm"),
            query_norm=vector_pointer(norms[1], (wide,), kinds, f"{where}.query_norm"),
            conv_norm=vector_pointer(norms[2], (wide,), kinds, f"{where}.conv_norm"),
            gated=vector_pointer(gated, shape, F32, f"{where}.gated"),
            normed=vector_pointer(normed, shape, F32, f"{where}.normed"),
            tokens=tokens,
            streams=_streams(wide, k, where),
            k=k,
            norm_dtype=CODES[norms[0].dtype],
            eps=eps,
        )
        if tokens:
            self.submit(stream, where, (byref(args),), (x, keys, values, *norms), (gated, normed))

    def table_add(
        self,
        stream: Stream,
        x: torch.Tensor,
        gated: torch.Tensor,
        normed: torch.Tensor,
        conv: torch.Tensor,
        dilation: int,
        place: DeltaPlace | DeltaRows,
    ) -> None:
        """x += gated + silu(the convolution of normed), all [T, wide], by conv [wide, width], the newest
        row's last. place: where the rows before lie, [(width - 1) * dilation, wide], which are overwritten,
        in place of a convolution's columns; without matrices."""
        where, (tokens, wide), width = (
            "table_add",
            matrix(x, "table_add.x"),
            matrix(conv, "table_add.conv")[1],
        )
        args = TableAddArgs(
            x=vector_pointer(x, (tokens, wide), F32, f"{where}.x"),
            gated=vector_pointer(gated, (tokens, wide), F32, f"{where}.gated"),
            normed=vector_pointer(normed, (tokens, wide), F32, f"{where}.normed"),
            conv=pointer(conv, (wide, width), F32, f"{where}.conv"),
            tokens=tokens,
            channels=wide,
            width=width,
            dilation=dilation,
        )
        reads = [x, gated, normed, conv]
        if isinstance(place, DeltaRows):
            require(len(place.table) >= tokens, "fewer places than rows", where, len(place.table), tokens)
            args.rows = pointer(place.table, (len(place.table), ROW_WORDS), I64, f"{where}.rows")
            args.past_offset = aligned(place.columns_offset, f"{where}.past")
            state, reads = list(place.memory), [*reads, place.table]
        else:
            past = ((width - 1) * dilation * wide,)
            # Of a convolution over one row there is none, but the kernel wants an address.
            args.past = pointer(place.columns, past, F32, f"{where}.past") or args.x
            args.start, state = place.start, [place.columns]
        if tokens:
            self.submit(stream, where, (byref(args),), [*reads, *state], (x, *state))


def _streams(wide: int, k: int, where: str) -> int:
    require(k > 0 and k % 8 == 0 and wide % k == 0, "no whole streams of multiples of 8", where, wide, k)
    return wide // k
