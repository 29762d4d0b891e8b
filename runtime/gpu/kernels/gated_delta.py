"""Wrappers of the gated delta rule, and of gates on attention's output."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    HALVES,
    I64,
    U8,
    aligned,
    matrix,
    pointer,
    require,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.attention_rows import ROW_WORDS
from krasis.runtime.gpu.kernels.launcher import Launcher, Tensors, present
from krasis.runtime.gpu.kernels.native import GatedDeltaArgs, GateRowsArgs
from krasis.runtime.planning.workspace import DELTA_CHUNK_BYTES

GATE_CODES = {"silu": 0, "sigmoid": 1}


@dataclass(frozen=True, slots=True)
class DeltaForm:
    """A layer's vectors. conv float32 [channels, conv_width], the newest row's last; a_log, dt_bias float32
    [value_heads], of ``ChannelDelta`` dt_bias [heads * dim]; gate_norm [value_dim] of any float type, with
    its eps.
    """

    mixer: GatedDelta | ChannelDelta
    conv: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    gate_norm: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class DeltaPlace:
    """Rows of one sequence, which has had start rows before: its state, float32 matrices [value_heads *
    key_dim * value_dim] and columns [(conv_width - 1) * channels].
    """

    matrices: torch.Tensor
    columns: torch.Tensor
    start: int


@dataclass(frozen=True, slots=True)
class DeltaRows:
    """Rows of several sequences: table as ``CacheRows`` has it. Their states lie in memory, at the slot's
    address and these offsets in bytes.
    """

    table: torch.Tensor
    memory: Tensors
    matrices_offset: int
    columns_offset: int


class DeltaKernels(Launcher):
    """T: rows of a call; T = 0 launches nothing. All tensors on the device and contiguous."""

    def gate_rows(self, stream: Stream, x: torch.Tensor, gates: torch.Tensor) -> None:
        """x [T, n] *= sigmoid(gates [T, n]), of one float type; n % 8 == 0."""
        where, shape = "gate_rows", matrix(x, "gate_rows.x")
        args = GateRowsArgs(
            x=vector_pointer(x, shape, FLOATS, f"{where}.x"),
            gates=vector_pointer(gates, shape, (x.dtype,), f"{where}.gates"),
            count=x.numel(),
            dtype=CODES[x.dtype],
        )
        if x.numel():
            self.submit(stream, where, (byref(args),), (x, gates), (x,))

    def gated_delta(
        self,
        stream: Stream,
        x: torch.Tensor,
        gates: torch.Tensor,
        form: DeltaForm,
        place: DeltaPlace | DeltaRows,
        mixed: torch.Tensor,
        out: torch.Tensor,
        chunks: torch.Tensor | None = None,
        *,
        decays: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
    ) -> None:
        """out [T, value_heads * value_dim] of x [T, channels + value_heads * value_dim], rows of q, k, v, z,
        and gates float32 [T, 2 * value_heads], b and a, which are overwritten, and so are mixed [T, channels]
        and the state. x, mixed and out of one 16-bit type. chunks: uint8 workspace for many rows of one
        sequence, in whole chunks of DELTA_CHUNK_BYTES a head; without one they go through row by row. Of
        ``ChannelDelta`` gates are b alone, and decays, overwritten, and z are float32 [T, heads * dim]: x has
        no z.
        """
        where, mixer = "gated_delta", form.mixer
        tokens, values = matrix(out, f"{where}.out")[0], mixer.value_heads * mixer.value_dim
        by_channel = isinstance(mixer, ChannelDelta)
        columns = (mixer.conv_channels + (0 if by_channel else values), mixer.conv_channels)
        num_gates, num_biases = mixer.value_heads, mixer.value_heads * mixer.key_dim
        if not by_channel:
            num_gates, num_biases = 2 * mixer.value_heads, mixer.value_heads
        require(mixer.gate in GATE_CODES, "no such gate", where, mixer.gate, "")
        args = GatedDeltaArgs(
            x=vector_pointer(x, (tokens, columns[0]), HALVES, f"{where}.x"),
            gates=pointer(gates, (tokens, num_gates), F32, f"{where}.gates"),
            mixed=vector_pointer(mixed, (tokens, columns[1]), (x.dtype,), f"{where}.mixed"),
            out=vector_pointer(out, (tokens, values), (x.dtype,), f"{where}.out"),
            tokens=tokens,
            key_heads=mixer.key_heads,
            value_heads=mixer.value_heads,
            key_dim=mixer.key_dim,
            value_dim=mixer.value_dim,
            conv_width=mixer.conv_width,
            conv=pointer(form.conv, (mixer.conv_channels, mixer.conv_width), F32, f"{where}.conv"),
            a_log=pointer(form.a_log, (mixer.value_heads,), F32, f"{where}.a_log"),
            dt_bias=pointer(form.dt_bias, (num_biases,), F32, f"{where}.dt_bias"),
            gate_norm=pointer(form.gate_norm, (mixer.value_dim,), FLOATS, f"{where}.gate_norm"),
            dtype=CODES[x.dtype],
            norm_dtype=CODES[form.gate_norm.dtype],
            eps=form.eps,
            gate=GATE_CODES[mixer.gate],
        )
        state = _set_state(args, place, mixer, tokens)
        require(by_channel == (decays is not None and z is not None), "decays go with channels", where, z, "")
        if isinstance(mixer, ChannelDelta) and decays is not None and z is not None:
            args.decays = pointer(decays, (tokens, num_biases), F32, f"{where}.decays")
            args.z = pointer(z, (tokens, values), F32, f"{where}.z")
            args.lower_bound = mixer.lower_bound or 0.0
        if chunks is not None:
            args.chunks = vector_pointer(chunks, tuple(chunks.shape), U8, f"{where}.chunks")
            args.num_chunks = chunks.numel() // (mixer.value_heads * DELTA_CHUNK_BYTES)
            require(args.num_chunks > 0, "no room for a chunk", where, chunks.numel(), DELTA_CHUNK_BYTES)
        reads = [x, gates, form.conv, form.a_log, form.dt_bias, form.gate_norm, *state, *present(decays, z)]
        if isinstance(place, DeltaRows):
            reads.append(place.table)
        if tokens:
            self.submit(
                stream, where, (byref(args),), reads, (gates, mixed, out, *state, *present(chunks, decays))
            )


def _set_state(
    args: GatedDeltaArgs, place: DeltaPlace | DeltaRows, mixer: GatedDelta | ChannelDelta, tokens: int
) -> list[torch.Tensor]:
    """The memory of the states."""
    where = "gated_delta"
    if isinstance(place, DeltaRows):
        require(len(place.table) >= tokens, "fewer places than rows", where, len(place.table), tokens)
        args.rows = pointer(place.table, (len(place.table), ROW_WORDS), I64, f"{where}.rows")
        args.matrices_offset = aligned(place.matrices_offset, f"{where}.matrices")
        args.columns_offset = aligned(place.columns_offset, f"{where}.columns")
        return list(place.memory)
    if place.start < 0:
        raise NativeError("a sequence cannot begin before its first row", where=where, got=place.start)
    numbers = mixer.value_heads * mixer.key_dim * mixer.value_dim
    past = mixer.conv_channels * (mixer.conv_width - 1)
    args.start = place.start
    args.matrices = vector_pointer(place.matrices, (numbers,), F32, f"{where}.matrices")
    # Of a convolution over one row there are none, but the kernel wants an address.
    args.columns = vector_pointer(place.columns, (past,), F32, f"{where}.columns") or args.matrices
    return [place.matrices, place.columns]
