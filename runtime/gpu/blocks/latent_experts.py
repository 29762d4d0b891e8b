"""Experts that work between two projections, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from krasis.runtime.gpu.blocks.rows import PassRows
from krasis.runtime.gpu.buffers import Buffers

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class LatentProducts:
    """What takes a layer's rows to its experts' width, and their sum back."""

    def __init__(self, model: GpuModel, layer: int) -> None:
        weights = model.weights.layers[layer]
        self._input, self._output = (
            weights.int8("experts.latent_input"),
            weights.int8("experts.latent_output"),
        )

    @staticmethod
    def seen(buffers: Buffers) -> Buffers:
        """Buffers as the routed experts see them: of their own width is what they read and add to."""
        b = buffers
        return replace(b, normed=b.latent_rows, x=b.latent_x, gathered_x=b.latent_x, hidden=b.latent_sum)

    def begin(self, rows: PassRows) -> None:
        """The experts' input, in both types that they take, of ``own.x``; and zeros, to which they add."""
        b = rows.own
        rows.product(b.x, self._input, b.latent_x)

        def action(_: int) -> None:
            b.latent_rows.copy_(b.latent_x)
            b.latent_sum.zero_()

        rows.stream.launch("widen latents", action, reads=(b.latent_x,), writes=(b.latent_rows, b.latent_sum))

    def end(self, rows: PassRows) -> None:
        """hidden += the projection of what the experts added up."""
        b = rows.own

        def action(_: int) -> None:
            b.latent_x.copy_(b.latent_sum)

        rows.stream.launch("narrow latents", action, reads=(b.latent_sum,), writes=(b.latent_x,))
        rows.product(b.latent_x, self._output, b.hidden, residual=b.hidden)
