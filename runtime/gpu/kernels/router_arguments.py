"""A ``Router`` record as arguments of ``krasis_cuda_route``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from krasis.formats.models.mlps import Router, Score
from krasis.runtime.gpu.kernels.arguments import F32, pointer, require
from krasis.runtime.gpu.kernels.native import RouteArgs

SCORE_CODES: dict[Score, int] = {
    "softmax": 0,
    "sigmoid": 1,
    "sqrt_softplus": 2,
    "softmax_of_top": 3,
    "sigmoid_of_top": 4,
}
"""``KRASIS_CUDA_SCORE_SOFTMAX`` and what follows it."""
GROUP_CODES = {"best_two": 0, "best": 1}
MAX_GROUPS = 64


@dataclass(frozen=True, slots=True)
class RouterVectors:
    """float32 [E] on the device, each where the router asks for it: of the logits; added for the choice
    alone; on the weights.
    """

    bias: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    expert_scale: torch.Tensor | None = None


NO_VECTORS = RouterVectors()


def set_router(
    args: RouteArgs, router: Router, vectors: RouterVectors, num_experts: int
) -> list[torch.Tensor]:
    """Sets what the router says; returns the vectors that the kernel reads. Raises NativeError for vectors
    that are missing or not asked for."""
    wanted = {
        "logit_bias": (router.bias, vectors.bias),
        "correction": (router.correction_bias, vectors.correction),
        "expert_scale": (router.expert_scale, vectors.expert_scale),
    }
    used: list[torch.Tensor] = []
    for name, (asked, vector) in wanted.items():
        given = vector is not None
        require(asked == given, "the router says otherwise", f"route.{name}", given, asked)
        if vector is not None:
            setattr(args, name, pointer(vector, (num_experts,), F32, f"route.{name}"))
            used.append(vector)
    args.normalize = 1 if router.renormalise else 0
    args.score = SCORE_CODES[router.score]
    args.logit_cap = router.logit_cap or 0.0
    args.scale, args.sum_floor, args.sum_epsilon = router.scale, router.sum_floor, router.sum_epsilon
    args.groups, args.top_groups = router.groups, router.top_groups
    args.group_score = GROUP_CODES[router.group_score]
    return used
