"""Wrappers of the kernels of dense layers: norms and INT8 products."""

from __future__ import annotations

from ctypes import byref

import torch

from krasis.formats.layouts import STRIP_ROWS
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    HALVES,
    I8,
    matrix,
    pointer,
    require,
    row_pointer,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.launcher import Launcher, present
from krasis.runtime.gpu.kernels.native import Int8GemmArgs, RmsNormArgs


class DenseKernels(Launcher):
    """T: tokens of a call; T = 0 launches nothing. All tensors on the device, contiguous unless said."""

    def rms_norm(
        self, stream: Stream, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """out [T, k] = x [T, k] / rms(x) * weight [k]; each float32, bfloat16 or float16; k % 8 == 0."""
        tokens, k = matrix(x, "rms_norm.x")
        args = RmsNormArgs(
            vector_pointer(x, (tokens, k), FLOATS, "rms_norm.x"),
            vector_pointer(weight, (k,), FLOATS, "rms_norm.weight"),
            vector_pointer(out, (tokens, k), FLOATS, "rms_norm.out"),
            tokens,
            k,
            CODES[x.dtype],
            CODES[weight.dtype],
            CODES[out.dtype],
            eps,
        )
        require(k % 8 == 0, "k is not a multiple of 8", "rms_norm", k, 8)
        if tokens:
            self.submit(stream, "rms_norm", (byref(args),), (x, weight), (out,))

    def int8_gemm(
        self,
        stream: Stream,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        """out [T, n] = (residual [T, n] +) x [T, k] x W^T; W int8 [n/32, k/4, 32, 4] with float32 scales [n].

        x 16 bits; out and residual of x's type or float32, residual may be out. Rows of x may lie apart, and
        rows of out and residual alike. k % 64 == 0.
        """
        tokens, k = matrix(x, "int8_gemm.x")
        n = matrix(out, "int8_gemm.out")[1]
        require(k % 64 == 0 and n % STRIP_ROWS == 0, "sizes do not fit tiles", "int8_gemm", (k, n), "64, 32")
        x_pointer, x_stride = row_pointer(x, (tokens, k), HALVES, "int8_gemm.x")
        out_pointer, out_stride = row_pointer(out, (tokens, n), (x.dtype, *F32), "int8_gemm.out")
        residual_pointer = None
        if residual is not None:
            residual_pointer, stride = row_pointer(residual, (tokens, n), (out.dtype,), "int8_gemm.residual")
            require(
                stride == out_stride, "rows lie unlike those of out", "int8_gemm.residual", stride, out_stride
            )
        args = Int8GemmArgs(
            x_pointer,
            x_stride,
            tokens,
            k,
            n,
            CODES[x.dtype],
            CODES[out.dtype],
            vector_pointer(codes, (n // STRIP_ROWS, k // 4, STRIP_ROWS, 4), I8, "int8_gemm.codes"),
            pointer(scales, (n,), F32, "int8_gemm.scales"),
            residual_pointer,
            out_pointer,
            out_stride,
        )
        if tokens:
            reads = present(x, codes, scales, residual)
            self.submit(stream, "int8_gemm", (byref(args),), reads, (out,))

    def int8_dequant(
        self, stream: Stream, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor
    ) -> None:
        """out [n, k], 16 bits = W, as in ``int8_gemm``."""
        n, k = matrix(out, "int8_dequant.out")
        arguments = (
            vector_pointer(codes, (n // STRIP_ROWS, k // 4, STRIP_ROWS, 4), I8, "int8_dequant.codes"),
            pointer(scales, (n,), F32, "int8_dequant.scales"),
            n,
            k,
            _half_code(out, "int8_dequant.out"),
            vector_pointer(out, (n, k), HALVES, "int8_dequant.out"),
        )
        self.submit(stream, "int8_dequant", arguments, (codes, scales), (out,))


def _half_code(tensor: torch.Tensor, where: str) -> int:
    require(tensor.dtype in HALVES, "must have 16 bits", where, tensor.dtype, HALVES)
    return CODES[tensor.dtype]
