"""Products with INT8 weights: one function in which the path is chosen."""

from __future__ import annotations

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels import GpuKernels
from krasis.runtime.gpu.weights import GpuInt8


def dense_product(
    kernels: GpuKernels,
    stream: Stream,
    x: torch.Tensor,
    weight: GpuInt8,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> None:
    """out [T, n] = (residual +) x [T, k] x weight^T. out and residual of x's dtype or f32; residual may be
    out.
    """
    kernels.int8_gemm(stream, x, weight.codes, weight.scales, out, residual=residual)
