"""The wrapper of Mamba-2."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import Mamba2
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    HALVES,
    I64,
    aligned,
    matrix,
    optional_pointer,
    pointer,
    require,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.attention_rows import ROW_WORDS
from krasis.runtime.gpu.kernels.gated_delta import DeltaPlace, DeltaRows
from krasis.runtime.gpu.kernels.launcher import Launcher, present
from krasis.runtime.gpu.kernels.native import Mamba2Args


@dataclass(frozen=True, slots=True)
class MambaForm:
    """A layer's vectors, float32. conv [channels, conv_width], the newest row's last; conv_bias [channels] or
    None; a_log, dt_bias, skip [heads]; gate_norm [heads * head_dim] of any float type, with its eps.
    """

    mixer: Mamba2
    conv: torch.Tensor
    conv_bias: torch.Tensor | None
    a_log: torch.Tensor
    dt_bias: torch.Tensor
    skip: torch.Tensor
    gate_norm: torch.Tensor
    eps: float


def mixed_columns(mixer: Mamba2) -> int:
    """Of the 16-bit buffer between the projections: the scan's float32 result, and the convolution's."""
    return 2 * mixer.inner + mixer.conv_channels


class MambaKernels(Launcher):
    """T: rows of a call; T = 0 launches nothing. All tensors on the device and contiguous."""

    def mamba2(
        self,
        stream: Stream,
        x: torch.Tensor,
        steps: torch.Tensor,
        form: MambaForm,
        place: DeltaPlace | DeltaRows,
        mixed: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """out [T, heads * head_dim] of x [T, columns], rows of z, inputs, B and C, and steps float32 [T,
        heads], which are overwritten, and so are mixed [T, ``mixed_columns``] and the state. x, mixed and
        out of one 16-bit type.
        """
        where, mixer = "mamba2", form.mixer
        (tokens, inner), ldx, heads = matrix(out, f"{where}.out"), matrix(x, f"{where}.x")[1], mixer.heads
        vector_pointer(mixed, (tokens, mixed_columns(mixer)), (x.dtype,), f"{where}.mixed")
        flat, channels = mixed.flatten(), mixer.conv_channels
        scanned = flat[: 2 * tokens * inner].view(torch.float32).view(tokens, inner)
        convolved = flat[2 * tokens * inner :].view(tokens, channels)
        args = Mamba2Args(
            x=vector_pointer(x, (tokens, ldx), HALVES, f"{where}.x"),
            steps=pointer(steps, (tokens, heads), F32, f"{where}.steps"),
            mixed=vector_pointer(convolved, (tokens, channels), (x.dtype,), f"{where}.mixed"),
            scanned=vector_pointer(scanned, (tokens, mixer.inner), F32, f"{where}.scanned"),
            out=vector_pointer(out, (tokens, mixer.inner), (x.dtype,), f"{where}.out"),
            ldx=ldx,
            tokens=tokens,
            heads=heads,
            head_dim=mixer.head_dim,
            state_dim=mixer.state_dim,
            groups=mixer.groups,
            conv_width=mixer.conv_width,
            conv=pointer(form.conv, (channels, mixer.conv_width), F32, f"{where}.conv"),
            conv_bias=optional_pointer(form.conv_bias, (channels,), F32, f"{where}.conv_bias"),
            a_log=pointer(form.a_log, (heads,), F32, f"{where}.a_log"),
            dt_bias=pointer(form.dt_bias, (heads,), F32, f"{where}.dt_bias"),
            skip=pointer(form.skip, (heads,), F32, f"{where}.skip"),
            gate_norm=pointer(form.gate_norm, (mixer.inner,), FLOATS, f"{where}.gate_norm"),
            dtype=CODES[x.dtype],
            norm_dtype=CODES[form.gate_norm.dtype],
            eps=form.eps,
            min_step=mixer.min_step,
        )
        state = _set_state(args, place, mixer, tokens)
        vectors = present(form.conv, form.conv_bias, form.a_log, form.dt_bias, form.skip, form.gate_norm)
        reads = [x, steps, *vectors, *state]
        if isinstance(place, DeltaRows):
            reads.append(place.table)
        if tokens:
            self.submit(stream, where, (byref(args),), reads, (steps, mixed, out, *state))


def _set_state(
    args: Mamba2Args, place: DeltaPlace | DeltaRows, mixer: Mamba2, tokens: int
) -> list[torch.Tensor]:
    """The memory of the states."""
    where = "mamba2"
    if isinstance(place, DeltaRows):
        require(len(place.table) >= tokens, "fewer places than rows", where, len(place.table), tokens)
        args.rows = pointer(place.table, (len(place.table), ROW_WORDS), I64, f"{where}.rows")
        args.matrices_offset = aligned(place.matrices_offset, f"{where}.matrices")
        args.columns_offset = aligned(place.columns_offset, f"{where}.columns")
        return list(place.memory)
    if place.start < 0:
        raise NativeError("a sequence cannot begin before its first row", where=where, got=place.start)
    past = mixer.conv_channels * (mixer.conv_width - 1)
    args.start = place.start
    numbers = (mixer.inner * mixer.state_dim,)
    args.matrices = vector_pointer(place.matrices, numbers, F32, f"{where}.matrices")
    # Of a convolution over one row there are none, but the kernel wants an address.
    args.columns = vector_pointer(place.columns, (past,), F32, f"{where}.columns") or args.matrices
    return [place.matrices, place.columns]
