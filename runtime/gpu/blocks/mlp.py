"""MLPs that every token takes, on a GPU: dense layers, and the products of shared experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from krasis.formats.models.mlps import GatedMlp
from krasis.runtime.gpu.blocks.rows import PassRows, packed

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel


class MlpProducts:
    """down(activation(gate x, up x)). prefix: of the tensors' names. bias2: of the output."""

    def __init__(self, model: GpuModel, layer: int, prefix: str, mlp: GatedMlp) -> None:
        weights = model.weights.layers[layer]
        self._kernels, self._mlp = model.kernels, mlp
        self._w13, self._w2 = weights.int8(f"{prefix}.w13"), weights.int8(f"{prefix}.w2")
        self._bias13 = weights.optional(f"{prefix}.w13.bias")
        self.bias2 = weights.optional(f"{prefix}.w2.bias")
        self._columns = mlp.intermediate * (2 if mlp.activation.gated else 1)

    def run(
        self, rows: PassRows, x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None
    ) -> None:
        """out [T, hidden] = (residual + bias2 +) the MLP of x [T, hidden], 16 bits; with a residual f32."""
        columns = packed(rows.own.mlp, self._columns)
        gated = packed(rows.own.mlp_gated, self._mlp.intermediate)
        rows.product(x, self._w13, columns)
        self._kernels.gated_activation(rows.stream, columns, self._mlp.activation, gated, self._bias13)
        rows.product(gated, self._w2, out, residual=residual)
        if self.bias2 is not None and residual is not None:
            self._kernels.add_rows(rows.stream, out, None, bias=self.bias2)


class GpuMlp:
    """The MLP of a layer without experts."""

    def __init__(self, model: GpuModel, layer: int, mlp: GatedMlp) -> None:
        self._kernels, self._eps = model.kernels, model.spec.norm.eps
        self._norm = model.weights.layers[layer].plain("mlp.norm")
        self._products = MlpProducts(model, layer, "mlp", mlp)

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b = rows.own
        self._kernels.rms_norm(rows.stream, b.hidden, self._norm, self._eps, b.x)
        self._products.run(rows, b.x, b.hidden, residual=b.hidden)
