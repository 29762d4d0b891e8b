"""Products in float32 of a prefill pass: routers, and gates of residual streams."""

from __future__ import annotations

import torch

from krasis.runtime.device.api import Stream


def router_product(stream: Stream, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out f32 [T, experts] = x f32 [T, k] x weight [experts, k]^T, in f32: a router's near-ties are decided
    by it."""

    def action(_: int) -> None:
        torch.mm(x, weight.float().t(), out=out)

    stream.launch("router", action, reads=(x, weight), writes=(out,))
