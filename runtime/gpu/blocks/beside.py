"""A dense MLP beside routed experts, each with norms before and after (Gemma 4), on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from krasis.formats.models.mlps import MlpBesideExperts
from krasis.runtime.gpu.blocks.experts import GpuExperts
from krasis.runtime.gpu.blocks.mlp import MlpProducts
from krasis.runtime.gpu.blocks.rows import PassRows

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class GpuMlpBesideExperts(GpuExperts):
    """hidden = (hidden + norm(norm(MLP) + norm(experts))) scale, each of a norm of hidden.

    Experts add to ``own.hidden``, wherever they are: meanwhile the residual is kept in ``own.residual``.
    """

    def __init__(self, model: GpuModel, layer: int, mlp: MlpBesideExperts) -> None:
        super().__init__(model, layer, mlp.experts)
        weights = model.weights.layers[layer]
        self._products = MlpProducts(model, layer, "mlp", mlp.mlp)
        self._mlp_norm, self._own_post_norm = weights.plain("mlp.norm"), weights.plain("mlp.own_post_norm")
        self._experts_norm = weights.plain("experts.norm")
        self._experts_post_norm = weights.plain("experts.post_norm")
        self._post_norm, self._scale = weights.plain("mlp.post_norm"), weights.plain("output_scale")

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b, kernels, stream, eps = rows.own, self._kernels, rows.stream, self.eps
        self._choose(rows)
        kernels.rms_norm(stream, b.hidden, self._mlp_norm, eps, b.x)
        self._products.run(rows, b.x, b.added)
        kernels.rms_norm(stream, b.added, self._own_post_norm, eps, b.added)
        if rows.takes_x:
            kernels.rms_norm(stream, b.hidden, self._experts_norm, eps, b.x)
        self._set_aside(rows)
        rows.run_experts(self)
        kernels.rms_norm(stream, b.hidden, self._experts_post_norm, eps, b.hidden)
        kernels.add_rows(stream, b.added, b.hidden)
        kernels.rms_norm(stream, b.added, self._post_norm, eps, b.added)
        self._join(rows)

    def _set_aside(self, rows: PassRows) -> None:
        hidden, residual = rows.own.hidden, rows.own.residual

        def action(_: int) -> None:
            residual.copy_(hidden)
            hidden.zero_()

        rows.stream.launch("set the residual aside", action, reads=(hidden,), writes=(residual, hidden))

    def _join(self, rows: PassRows) -> None:
        b, scale = rows.own, self._scale

        def action(_: int) -> None:
            torch.add(b.residual, b.added, out=b.hidden)
            b.hidden.mul_(scale)

        rows.stream.launch(
            "join the residual", action, reads=(b.residual, b.added, scale), writes=(b.hidden,)
        )
