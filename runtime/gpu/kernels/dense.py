"""Wrappers of the kernels of dense layers: norms, INT8 products, heads and caches."""

from __future__ import annotations

from ctypes import byref

import torch

from krasis.formats.errors import NativeError
from krasis.formats.layouts import STRIP_ROWS
from krasis.runtime.cpu.kernels import Heads
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I64,
    matrix,
    optional_pointer,
    pointer,
    require,
    row_pointer,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.launcher import Launcher, present
from krasis.runtime.gpu.kernels.native import Int8GemmArgs, QkvArgs, RmsNormArgs


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

    def qk_norm_rope_store(
        self,
        stream: Stream,
        qkv: torch.Tensor,
        start: int,
        heads: Heads,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start_device: torch.Tensor | None = None,
    ) -> None:
        """Norm and rotate q in place; norm and rotate k, and copy v, into the caches at start..start+T-1.

        qkv [T, heads.qkv_size] and the caches [num_kv_heads, capacity, head_dim] of one 16-bit type; norms
        [head_dim], or None for neither; cos, sin float32 [positions, head_dim/2]. start_device int64 [1]: the
        position, read when the kernel runs (start is then ignored, and all of the caches count as written).
        """
        where, dim = "qk_norm_rope_store", heads.head_dim
        tokens = matrix(qkv, f"{where}.qkv")[0]
        require(keys.dim() == 3, "cache must have three dimensions", f"{where}.keys", list(keys.shape), 3)
        capacity, positions = keys.shape[1], cos.shape[0]
        caches, end = (heads.num_kv_heads, capacity, dim), start + tokens
        if start_device is None and not (start >= 0 and end <= min(capacity, positions)):
            raise NativeError(
                "positions out of range", where=where, got=(start, end), limit=(capacity, positions)
            )
        norm = k_norm if q_norm is None else q_norm
        args = QkvArgs(
            vector_pointer(qkv, (tokens, heads.qkv_size), HALVES, f"{where}.qkv"),
            tokens,
            0 if start_device is not None else start,
            heads.num_heads,
            heads.num_kv_heads,
            dim,
            optional_pointer(q_norm, (dim,), FLOATS, f"{where}.q_norm"),
            optional_pointer(k_norm, (dim,), FLOATS if norm is None else (norm.dtype,), f"{where}.k_norm"),
            CODES[qkv.dtype],
            0 if norm is None else CODES[norm.dtype],
            eps,
            0,
            pointer(cos, (positions, dim // 2), F32, f"{where}.cos"),
            pointer(sin, (positions, dim // 2), F32, f"{where}.sin"),
            positions,
            vector_pointer(keys, caches, (qkv.dtype,), f"{where}.keys"),
            vector_pointer(values, caches, (qkv.dtype,), f"{where}.values"),
            capacity,
            optional_pointer(start_device, (1,), I64, f"{where}.start_device"),
        )
        if not tokens:
            return
        span = slice(None) if start_device is not None else slice(start, end)
        reads = present(qkv, q_norm, k_norm, cos[span], sin[span], start_device)
        # Only its queries are written; named as a whole, qkv is one range of bytes instead of one a token.
        writes = (qkv, keys[:, span], values[:, span])
        self.submit(stream, where, (byref(args),), reads, writes)


def _half_code(tensor: torch.Tensor, where: str) -> int:
    require(tensor.dtype in HALVES, "must have 16 bits", where, tensor.dtype, HALVES)
    return CODES[tensor.dtype]
