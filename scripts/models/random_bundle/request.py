"""What to write."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.architecture import Architecture, from_hf_config
from krasis.formats.layouts import CpuTileLayout, MarlinLayout, MarlinMxfp4Layout
from krasis.formats.models.spec import ModelSpec
from scripts.models.family_shapes import spec_of_config
from scripts.models.model_files import MoeShape, Shape, hub_config

POOL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class BundleRequest:
    """What to write. tiers: of gpu, cpu. gpu_group: input features a scale. cpu_format: q8, i4 or mxfp4, in
    which the GPU's experts are then, too. tokenizer: the tiny model's, where the vocabulary has room for it.
    """

    shape: Shape
    seed: int = 0
    tiers: tuple[str, ...] = ("gpu", "cpu")
    gpu_group: int = 128
    cpu_format: str = "q8"
    num_threads: int = 0
    pool_bytes: int = POOL_BYTES

    @property
    def gpu_layout(self) -> MarlinLayout | MarlinMxfp4Layout:
        if self.cpu_format == "mxfp4":
            return MarlinMxfp4Layout()
        return MarlinLayout(4, self.gpu_group, "BF16")

    @property
    def cpu_layout(self) -> CpuTileLayout:
        return CpuTileLayout(self.cpu_format)


def spec_of_shape(shape: Shape) -> ModelSpec:
    """The model of a shape."""
    return spec_of_config(hub_config(shape))


def architecture_of(shape: MoeShape) -> Architecture:
    """Our record of a shape."""
    return from_hf_config(hub_config(shape), "random bundle")
