"""Experts that work between two projections, on the CPU."""

from __future__ import annotations

import numpy as np

from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.buffers import Buffers
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.weights import LayerWeights


class LatentProducts:
    """What takes a layer's rows to its experts' width, and their sum back. width: a multiple of 32."""

    def __init__(self, buffers: Buffers, width: int, weights: LayerWeights) -> None:
        self._buffers, self._width = buffers, width
        self._input = weights.int8("experts.latent_input")
        self._output = weights.int8("experts.latent_output")
        self._zeros = np.zeros(width, np.float32)
        buffers.reserve("latent_experts", max(width, self._input.num_rows))
        buffers.reserve_acts(width)

    def begin(self, kernels: Kernels, acts: Acts) -> tuple[Acts, Array]:
        """Activations [T, width] for the experts, and zeros of that shape, to which they add."""
        latents = self._buffers.rows("latent_experts", acts.tokens, self._width)
        latent_acts = self._buffers.acts(acts.tokens, self._width)
        kernels.gemm_int8_rows(acts, self._input.codes, self._input.scales, latents)
        kernels.quantize(latents, latent_acts)
        kernels.rms_norm(latents, self._zeros, 1.0, latents)
        return latent_acts, latents

    def end(self, kernels: Kernels, latents: Array, out: Array) -> None:
        """out [T, hidden] += the projection of what the experts added up."""
        acts = self._buffers.acts(len(latents), self._width)
        kernels.quantize(latents, acts)
        kernels.gemm_int8_rows(acts, self._output.codes, self._output.scales, out, accumulate=True)
