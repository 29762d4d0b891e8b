"""Formats of a bundle that is not made yet, for its plan: as asked, or as memory allows."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.checkpoints.quantised.kept import NO_CODES, KeptCodes
from krasis.formats.errors import ResourceError, UsageError
from krasis.formats.layouts import CPU_FORMATS, GPU_FORMATS
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.planning.hardware import HardwareSpec
from krasis.runtime.planning.planner import make_plan
from krasis.runtime.planning.sizes import (
    MXFP4_GPU_LAYOUT,
    ModelSizes,
    default_gpu_layout,
    sizes_of_shape,
)
from krasis.runtime.planning.types import Workload

GPU_GROUPS: dict[str, int | None] = {"32": 32, "64": 64, "128": 128, "channel": None}
_BEST, _SMALLEST = "q8", "int4"


@dataclass(frozen=True, slots=True)
class ChosenFormats:
    """cpu_format: by the name that krasis-convert takes. reason: why that one, a clause."""

    sizes: ModelSizes
    cpu_format: str
    reason: str

    @property
    def bundle_bytes(self) -> int:
        """What the bundle takes on the disk, text files and padding between blobs aside."""
        sizes = self.sizes
        experts = sizes.gpu_experts_bytes + sizes.cpu_experts_bytes
        return sizes.dense_bytes + sizes.embedding_bytes + experts + sizes.table_bytes


def gpu_layout(spec: ModelSpec, group: str | None, kept: KeptCodes = NO_CODES) -> str:
    """The layout id of GPU experts. group: None for the default, see ``default_gpu_layout``, or that of the
    codes that are kept.

    Raises UsageError for one that does not divide them, UnsupportedModelError if none does.
    """
    sizes = _input_features(spec)
    if group is None and kept.mxfp4:
        return MXFP4_GPU_LAYOUT
    if group is None and kept.group in (32, 64):
        return GPU_FORMATS["marlin"](4, kept.group, "BF16").fitted(sizes).layout_id
    if group is None:
        return default_gpu_layout(spec)
    size = GPU_GROUPS[group]
    if size is not None and (odd := next((one for one in sizes if one % size), None)) is not None:
        raise UsageError(
            f"--gpu-group {group} does not divide the model's sizes", got=odd, hint="leave it out"
        )
    return GPU_FORMATS["marlin"](4, size, "BF16").layout_id


def _input_features(spec: ModelSpec) -> list[int]:
    experts = dict.fromkeys(layer.experts for layer in spec.layers if layer.experts is not None)
    widths = [spec.hidden if one.latent is None else one.latent for one in experts]
    return [*widths, *(one.intermediate for one in experts)]


def choose_formats(
    spec: ModelSpec,
    hardware: HardwareSpec,
    workload: Workload,
    *,
    cpu_format: str | None = None,
    gpu_group: str | None = None,
    kept: KeptCodes = NO_CODES,
) -> ChosenFormats:
    """The formats asked for; of the CPU's, if none is, what the model was released in, or the better one that
    fits in RAM beside the GPU's. kept: of a quantised checkpoint.

    Raises as ``gpu_layout`` and ``sizes_of_shape``.
    """
    group = gpu_layout(spec, gpu_group, kept)
    if cpu_format is not None:
        return ChosenFormats(_sizes(spec, group, cpu_format), cpu_format, "as asked for")
    best = sizes_of_shape(spec, group)
    name = next(name for name, tiles in CPU_FORMATS.items() if tiles.layout_id == best.cpu_layout)
    if name != _BEST:
        return ChosenFormats(best, name, "what the model was released in, without loss")
    if (name := kept.cpu_format or "") in CPU_FORMATS:
        return ChosenFormats(_sizes(spec, group, name), name, "the checkpoint's codes, without loss")
    try:
        host = make_plan(best, hardware, workload).host
    except ResourceError:
        return ChosenFormats(_sizes(spec, group, _SMALLEST), _SMALLEST, f"{_BEST} does not fit in RAM")
    if host.from_disk_bytes:
        reason = f"with {_BEST} a part of the GPU's experts would be read from the disk in every pass"
        return ChosenFormats(_sizes(spec, group, _SMALLEST), _SMALLEST, reason)
    beside = "beside the GPU's experts" if hardware.gpus else "whole"
    return ChosenFormats(best, _BEST, f"it fits in RAM {beside}")


def _sizes(spec: ModelSpec, group: str, cpu_format: str) -> ModelSizes:
    return sizes_of_shape(spec, group, CPU_FORMATS[cpu_format].layout_id)
