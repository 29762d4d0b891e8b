"""The wrapper of gated short convolutions."""

from __future__ import annotations

from ctypes import byref

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    HALVES,
    I64,
    aligned,
    matrix,
    pointer,
    require,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.attention_rows import ROW_WORDS
from krasis.runtime.gpu.kernels.gated_delta import DeltaPlace, DeltaRows
from krasis.runtime.gpu.kernels.launcher import Launcher
from krasis.runtime.gpu.kernels.native import ShortConvArgs


class ConvKernels(Launcher):
    """T: rows of a call; T = 0 launches nothing. All tensors on the device and contiguous."""

    def short_conv(
        self,
        stream: Stream,
        x: torch.Tensor,
        conv: torch.Tensor,
        place: DeltaPlace | DeltaRows,
        out: torch.Tensor,
    ) -> None:
        """out [T, channels] of x [T, 3 * channels], rows of b, c and x, of one 16-bit type. conv: float32
        [channels, width], the newest row's last. The state is overwritten; place: where it lies, without
        matrices.
        """
        where, (tokens, channels) = "short_conv", matrix(out, "short_conv.out")
        width = matrix(conv, f"{where}.conv")[1]
        args = ShortConvArgs(
            x=vector_pointer(x, (tokens, 3 * channels), HALVES, f"{where}.x"),
            out=vector_pointer(out, (tokens, channels), (x.dtype,), f"{where}.out"),
            tokens=tokens,
            channels=channels,
            width=width,
            conv=pointer(conv, (channels, width), F32, f"{where}.conv"),
            dtype=CODES[x.dtype],
        )
        if isinstance(place, DeltaRows):
            require(len(place.table) >= tokens, "fewer places than rows", where, len(place.table), tokens)
            args.rows = pointer(place.table, (len(place.table), ROW_WORDS), I64, f"{where}.rows")
            args.columns_offset = aligned(place.columns_offset, f"{where}.columns")
            state, reads = list(place.memory), [x, conv, place.table, *place.memory]
        else:
            if place.start < 0:
                raise NativeError(
                    "a sequence cannot begin before its first row", where=where, got=place.start
                )
            args.start = place.start
            past = (channels * (width - 1),)
            # Of a convolution over one row there are none, but the kernel wants an address.
            args.columns = vector_pointer(place.columns, past, F32, f"{where}.columns") or args.x
            state, reads = [place.columns], [x, conv, place.columns]
        if tokens:
            self.submit(stream, where, (byref(args),), reads, (out, *state))
