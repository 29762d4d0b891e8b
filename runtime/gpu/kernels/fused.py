"""Wrappers of kernels that do, for one token, the work of several: fewer launches, the same bits."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch

from krasis.formats.layouts import STRIP_ROWS
from krasis.formats.models.mlps import Router
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I32,
    I64,
    U8,
    matrix,
    optional_pointer,
    pointer,
    require,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.launcher import Launcher, present
from krasis.runtime.gpu.kernels.native import NormInt8Args, NormRouteArgs
from krasis.runtime.gpu.kernels.router_arguments import NO_VECTORS, RouterVectors, set_router

MAX_NORMED = 16384
"""``KRASIS_CUDA_MAX_NORMED``."""
MAX_ROUTED = 12256
"""Elements of a token and twice the experts, together."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the choice of a token goes. logits float32 [1, E]; ids int32, weights float32 [1, K]; the others
    as ``MoeKernels.route`` has them. arrivals int32 [1]: zero, as which it is left.
    """

    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    arrivals: torch.Tensor
    resident: torch.Tensor | None = None
    gpu_ids: torch.Tensor | None = None
    cpu_ids: torch.Tensor | None = None
    counts: torch.Tensor | None = None


def fits_norm_route(router: Router, hidden_size: int, num_experts: int) -> bool:
    """Whether ``norm_route`` can choose so."""
    return router.top_groups == router.groups and hidden_size + 2 * num_experts <= MAX_ROUTED


class FusedKernels(Launcher):
    """One token: hidden float32 [1, k]; norm [k] of any float type."""

    def norm_product(
        self,
        stream: Stream,
        hidden: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        codes: torch.Tensor,
        scales: torch.Tensor,
        out: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """out [1, n] = norm(hidden), rounded to dtype (16 bits), x W^T: as ``rms_norm`` and ``int8_gemm``.

        out of dtype or float32; k % 64 == 0, k <= MAX_NORMED.
        """
        k, n = hidden.numel(), matrix(out, "norm_product.out")[1]
        sizes = k % 64 == 0 and n % STRIP_ROWS == 0 and k <= MAX_NORMED
        require(sizes, "sizes do not fit tiles", "norm_product", (k, n), f"64, 32, {MAX_NORMED}")
        require(dtype in HALVES, "must have 16 bits", "norm_product", dtype, HALVES)
        args = NormInt8Args(
            hidden=vector_pointer(hidden, (1, k), F32, "norm_product.hidden"),
            norm=vector_pointer(norm, (k,), FLOATS, "norm_product.norm"),
            k=k,
            n=n,
            norm_dtype=CODES[norm.dtype],
            dtype=CODES[dtype],
            out_dtype=CODES[out.dtype],
            eps=eps,
            weight=vector_pointer(codes, (n // STRIP_ROWS, k // 4, STRIP_ROWS, 4), I8, "norm_product.codes"),
            scales=pointer(scales, (n,), F32, "norm_product.scales"),
            out=vector_pointer(out, (1, n), (dtype, *F32), "norm_product.out"),
        )
        self.submit(stream, "norm_int8_gemv", (byref(args),), (hidden, norm, codes, scales), (out,))

    def norm_route(
        self,
        stream: Stream,
        hidden: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        router: Router,
        choice: Choice,
        x: torch.Tensor,
        normed: torch.Tensor,
        vectors: RouterVectors = NO_VECTORS,
    ) -> None:
        """x [1, k] any float, normed float32 [1, k] = norm(hidden); the choice = the router's, of normed x
        weight [E, k]^T: as ``rms_norm`` twice, ``router`` and ``route``. Only where ``fits_norm_route``."""
        k, (_, num_experts), c = hidden.numel(), matrix(choice.logits, "norm_route.logits"), choice
        choices = (1, matrix(c.ids, "norm_route.ids")[1])
        fits = fits_norm_route(router, k, num_experts) and choices[1] == router.top_k
        require(fits, "no such choice in one launch", "norm_route", (k, num_experts, choices[1]), MAX_ROUTED)
        args = NormRouteArgs(
            hidden=vector_pointer(hidden, (1, k), F32, "norm_route.hidden"),
            norm=vector_pointer(norm, (k,), FLOATS, "norm_route.norm"),
            x=vector_pointer(x, (1, k), FLOATS, "norm_route.x"),
            normed=vector_pointer(normed, (1, k), F32, "norm_route.normed"),
            weight=vector_pointer(weight, (num_experts, k), FLOATS, "norm_route.weight"),
            k=k,
            norm_dtype=CODES[norm.dtype],
            x_dtype=CODES[x.dtype],
            weight_dtype=CODES[weight.dtype],
            eps=eps,
            arrivals=pointer(c.arrivals, (1,), I32, "norm_route.arrivals"),
        )
        route = args.route
        route.logits = pointer(c.logits, (1, num_experts), F32, "norm_route.logits")
        route.tokens, route.num_experts, route.top_k = 1, num_experts, router.top_k
        route.ids = pointer(c.ids, choices, I32, "norm_route.ids")
        route.weights = pointer(c.weights, choices, F32, "norm_route.weights")
        route.resident = optional_pointer(c.resident, (num_experts,), U8, "norm_route.resident")
        route.gpu_ids = optional_pointer(c.gpu_ids, choices, I32, "norm_route.gpu_ids")
        route.cpu_ids = optional_pointer(c.cpu_ids, choices, I32, "norm_route.cpu_ids")
        route.counts = optional_pointer(c.counts, (num_experts,), I64, "norm_route.counts")
        used = set_router(route, router, vectors, num_experts)
        reads = present(hidden, norm, weight, c.arrivals, c.resident, c.counts, *used)
        writes = present(x, normed, c.logits, c.ids, c.weights, c.arrivals, c.gpu_ids, c.cpu_ids, c.counts)
        self.submit(stream, "norm_route", (byref(args),), reads, writes)
