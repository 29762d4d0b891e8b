"""Wrappers of the kernels of MLPs that every token takes: activations, and what is added to the residual."""

from __future__ import annotations

from ctypes import byref

import torch

from krasis.formats.models.mlps import Activation, ActivationKind
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    matrix,
    optional_pointer,
    require,
    row_pointer,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.launcher import Launcher, present
from krasis.runtime.gpu.kernels.native import ActivationArgs, AddRowsArgs

ACTIVATION_CODES: dict[ActivationKind, int] = {
    "silu": 0,
    "gelu_tanh": 1,
    "swiglu_offset": 2,
    "silu_clamped_before": 3,
    "silu_clamped_after": 4,
    "relu_squared": 5,
}
"""``KRASIS_CUDA_SILU`` and what follows it."""


class MlpKernels(Launcher):
    """T: tokens of a call; T = 0 launches nothing. All tensors on the device, contiguous unless said."""

    def gated_activation(
        self,
        stream: Stream,
        x: torch.Tensor,
        activation: Activation,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """out [T, n] = activation of x [T, 2n], gate columns then up columns ([T, n] without a gate) + bias.

        x and out of one float type, their rows may lie apart; bias float32; n % 8 == 0.
        """
        where = "gated_activation"
        tokens, n = matrix(out, f"{where}.out")
        columns = 2 * n if activation.gated else n
        require(activation.kind in ACTIVATION_CODES, "no such activation", where, activation.kind, "")
        require(n % 8 == 0, "n is not a multiple of 8", where, n, 8)
        x_pointer, x_stride = row_pointer(x, (tokens, columns), FLOATS, f"{where}.x")
        out_pointer, out_stride = row_pointer(out, (tokens, n), (x.dtype,), f"{where}.out")
        args = ActivationArgs(
            x=x_pointer,
            x_stride=x_stride,
            tokens=tokens,
            n=n,
            bias=optional_pointer(bias, (columns,), F32, f"{where}.bias"),
            out=out_pointer,
            out_stride=out_stride,
            dtype=CODES[x.dtype],
            kind=ACTIVATION_CODES[activation.kind],
            limit=activation.limit,
            alpha=activation.alpha,
        )
        if tokens:
            self.submit(stream, where, (byref(args),), present(x, bias), (out,))

    def add_rows(
        self,
        stream: Stream,
        hidden: torch.Tensor,
        x: torch.Tensor | None,
        gates: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """hidden [T, n] += (sigmoid(gates [T, 1]) times) (x [T, n] + bias [n]); all but x float32."""
        where = "add_rows"
        tokens, n = matrix(hidden, f"{where}.hidden")
        require(n % 8 == 0, "n is not a multiple of 8", where, n, 8)
        args = AddRowsArgs(
            hidden=vector_pointer(hidden, (tokens, n), F32, f"{where}.hidden"),
            x=None if x is None else vector_pointer(x, (tokens, n), FLOATS, f"{where}.x"),
            gates=optional_pointer(gates, (tokens, 1), F32, f"{where}.gates"),
            bias=optional_pointer(bias, (n,), F32, f"{where}.bias"),
            tokens=tokens,
            n=n,
            x_dtype=0 if x is None else CODES[x.dtype],
        )
        if tokens:
            reads = present(hidden, x, gates, bias)
            self.submit(stream, where, (byref(args),), reads, (hidden,))
