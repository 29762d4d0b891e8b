"""Routed experts with their router, and a shared expert beside them, on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from krasis.formats.models.mlps import Experts
from krasis.runtime.gpu.blocks.latent_experts import LatentProducts
from krasis.runtime.gpu.blocks.mlp import MlpProducts
from krasis.runtime.gpu.blocks.rows import PassRows
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.kernels.router_arguments import RouterVectors

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuExperts:
    """index: among the layers that have experts, by which residency, streams and hand-over are numbered.
    router, vectors: how logits become a choice. top_k: experts of a token. norm, eps, router_weight: of what
    the experts and the router read (between residual streams there is no norm); router_norm: of a router that
    reads another norm, or None. latent: of experts between two projections.
    """

    def __init__(self, model: GpuModel, layer: int, mlp: Experts) -> None:
        weights = model.weights.layers[layer]
        self._kernels, self.eps = model.kernels, model.spec.norm.eps
        self.norm, self.router_weight = weights.optional("experts.norm"), weights.plain("experts.router")
        self.router_norm = _router_norm(model, layer) if mlp.router.input_norm else None
        self.index = sum(one.experts is not None for one in model.spec.layers[:layer])
        self.router, self.top_k = mlp.router, mlp.router.top_k
        self.vectors = RouterVectors(
            bias=weights.optional("experts.router.bias"),
            correction=weights.optional("experts.router.correction_bias"),
            expert_scale=weights.optional("experts.router.expert_scale"),
        )
        self._shared = None if mlp.shared is None else MlpProducts(model, layer, "shared", mlp.shared)
        self.latent = None if mlp.latent is None else LatentProducts(model, layer)
        self._shared_gate: torch.Tensor | None = weights.plain("shared.gate") if mlp.shared_gate else None

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b = rows.own
        if not rows.choose(self):
            if rows.takes_x or self._shared is not None or self.latent is not None:
                if self.norm is not None:
                    self._kernels.rms_norm(rows.stream, b.hidden, self.norm, self.eps, b.x)
                rows.x_is_ready()
            if self.latent is not None:
                self.latent.begin(rows)
            self._choose(rows)
        if self._shared is not None:
            self._run_shared(rows, self._shared)
        rows.run_experts(self)
        if self.latent is not None:
            self.latent.end(rows)

    def seen(self, buffers: Buffers) -> Buffers:
        """Buffers in which normed and x are what the routed experts read, and hidden what they add to."""
        return buffers if self.latent is None else self.latent.seen(buffers)

    def _choose(self, rows: PassRows) -> None:
        """normed, and the choice that the router makes of it, or of the residual itself."""
        b, norm = rows.own, self.norm if self.router_norm is None else self.router_norm
        if norm is not None:
            self._kernels.rms_norm(rows.stream, b.hidden, norm, self.eps, b.normed)
        rows.small_product(b.normed, self.router_weight, b.router_logits)
        if self.router_norm is not None and self.norm is not None:
            self._kernels.rms_norm(rows.stream, b.hidden, self.norm, self.eps, b.normed)
        rows.route(self)

    def _run_shared(self, rows: PassRows, shared: MlpProducts) -> None:
        b = rows.own
        if self._shared_gate is None:
            shared.run(rows, b.x, b.hidden, residual=b.hidden)
            return
        shared.run(rows, b.x, b.shared)
        rows.small_product(b.normed, self._shared_gate, b.shared_gate)
        self._kernels.add_rows(rows.stream, b.hidden, b.shared, b.shared_gate, shared.bias2)


def _router_norm(model: GpuModel, layer: int) -> torch.Tensor:
    """The weights of the norm that a router has of its own: its scale / sqrt(hidden)."""
    scale = model.weights.layers[layer].plain("experts.router.scale")
    norm = model.device.empty(tuple(scale.shape), torch.float32)

    def action(_: int) -> None:
        torch.mul(scale, model.spec.hidden**-0.5, out=norm)

    model.stream.launch("scale of a router", action, reads=(scale,), writes=(norm,))
    return norm
