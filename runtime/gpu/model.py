"""A model on a device: what every pass reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from krasis.formats.models.spec import Layer, ModelSpec
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.hashed_tables import GpuTables
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels
from krasis.runtime.gpu.kernels.many_rows import ManyRows
from krasis.runtime.gpu.kernels.routing import ExpertForm
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.token_history import TokenHistory
from krasis.runtime.gpu.weights import GpuWeights
from krasis.runtime.planning.shape import ModelShape, shape_of


@dataclass(frozen=True, slots=True)
class GpuModel:
    """many_rows: products of prefill's many tokens. stream: of all compute. tables: of n-grams."""

    spec: ModelSpec
    device: Device
    kernels: GpuKernels
    many_rows: ManyRows
    weights: GpuWeights
    cache: GpuKvCache
    dtype: torch.dtype
    stream: Stream
    tables: GpuTables | None = None

    @property
    def history(self) -> TokenHistory | None:
        """The sequences' token ids, of models with tables."""
        return None if self.tables is None else self.tables.history

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return shape_of(self.spec)

    def expert_forms(self) -> list[ExpertForm]:
        """Of each layer that has experts."""
        names = ("gate", "up", "down")
        return [
            ExpertForm(
                layer.experts.activation, *(weights.optional(f"experts.{part}.bias") for part in names)
            )
            for layer, weights in zip(self.spec.layers, self.weights.layers, strict=True)
            if layer.experts is not None
        ]

    def layers(self) -> list[tuple[int, Layer]]:
        """Every layer with its number."""
        return list(enumerate(self.spec.layers))
