"""What the user chose: validated settings of one conversion, and the recipe a bundle records of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from krasis.formats.bundle.shard_output import OUTPUT_IO, OutputIo
from krasis.formats.errors import UsageError
from krasis.formats.layouts import CPU_FORMATS, GPU_FORMATS, ExpertFormat, Int8RowsLayout

Tier = Literal["gpu", "cpu"]
TIERS: tuple[Tier, ...] = ("gpu", "cpu")
GPU_GROUPS: dict[str, int | None] = {"32": 32, "64": 64, "128": 128, "channel": None}
GPU_SCALES = {"bf16": "BF16", "f16": "F16"}
DEFAULT_GPU_GROUP = 128
AUTO = "auto"
MIN_SHARD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ConvertSettings:
    """Everything that is not an input. The first block decides the bundle's bytes; the second does not.

    leaves_gpu_out: tiers were not asked for: a model whose experts no format of the GPU's keeps has the
    CPU's alone. gpu_format, cpu_format: names of ``formats.layouts``. gpu_group: input features a scale
    covers, None = all of them, ``auto`` = 128, or the most below that divide the model's sizes.
    cpu_format ``auto``: ``q8``, or ``mxfp4`` for experts that the source has in MXFP4. num_threads: 0 =
    every CPU of this process. memory_limit_bytes: bound on memory beyond the page cache, None = what the
    machine has available. output_io: whether shards are written past the page cache. force_text: go on
    without text files that cannot be used. force_weights: weights that look damaged are told, and
    converted as they are.
    """

    tiers: tuple[Tier, ...] = TIERS
    leaves_gpu_out: bool = False
    gpu_bits: Literal[4, 8] = 4
    gpu_format: str = "marlin"
    gpu_group: int | Literal["auto"] | None = "auto"
    gpu_scales: Literal["bf16", "f16"] = "bf16"
    cpu_format: str = AUTO
    shard_bytes: int = 32 << 30
    calibration: Path | None = None

    num_threads: int = 0
    memory_limit_bytes: int | None = None
    output_io: OutputIo = "auto"
    replace: bool = field(default=False)
    restart: bool = field(default=False)
    full_verify: bool = field(default=False)
    force_text: bool = field(default=False)
    force_weights: bool = field(default=False)

    def __post_init__(self) -> None:
        """Raises UsageError for settings that contradict each other."""
        if not self.tiers or any(tier not in TIERS for tier in self.tiers):
            raise UsageError("--tiers names gpu, cpu or both", got=",".join(self.tiers) or "nothing")
        for option, name, known in (
            ("--gpu-format", self.gpu_format, GPU_FORMATS),
            ("--cpu-format", self.cpu_format, (*CPU_FORMATS, AUTO)),
        ):
            if name not in known:
                raise UsageError(f"unknown {option}", got=name, limit=", ".join(known))
        if self.shard_bytes < MIN_SHARD_BYTES:
            raise UsageError(
                "--shard-size is too small", got=f"{self.shard_bytes} bytes", limit="1 MiB or more"
            )
        if self.output_io not in OUTPUT_IO:
            raise UsageError("unknown --output-io", got=self.output_io, limit=", ".join(OUTPUT_IO))
        if self.num_threads < 0:
            raise UsageError("--threads must not be negative", got=self.num_threads)

    @property
    def gpu_layout(self) -> ExpertFormat:
        """How GPU experts are packed; before ``fitted``, with the largest group that ``auto`` may be."""
        group = DEFAULT_GPU_GROUP if self.gpu_group == "auto" else self.gpu_group
        return GPU_FORMATS[self.gpu_format](self.gpu_bits, group, GPU_SCALES[self.gpu_scales])

    @property
    def cpu_layout(self) -> ExpertFormat:
        """How CPU experts are packed; before ``fitted``, ``auto`` is ``q8``."""
        return CPU_FORMATS["q8" if self.cpu_format == AUTO else self.cpu_format]

    def fitted(self, sizes: Iterable[int], cpu_types: Iterable[str] = ()) -> ConvertSettings:
        """These settings with a group and a format for ``auto``. sizes: input features of the model's
        experts; cpu_types: what the CPU's are made from.

        Raises UnsupportedModelError if no group divides them.
        """
        if self.cpu_format == AUTO:
            chosen = "mxfp4" if set(cpu_types) == {"MXFP4"} else "q8"
            return replace(self, cpu_format=chosen).fitted(sizes)
        if self.gpu_group != "auto" or "gpu" not in self.tiers:
            return self
        return replace(self, gpu_group=self.gpu_layout.fitted(sizes).group_of(DEFAULT_GPU_GROUP))

    def layout(self, tier: str) -> ExpertFormat:
        """How a tier's experts are packed."""
        return self.gpu_layout if tier == "gpu" else self.cpu_layout

    def layouts(self) -> dict[str, str]:
        """Tier to layout id, for the manifest."""
        ids = {"dense": Int8RowsLayout().layout_id}
        if "gpu" in self.tiers:
            ids["gpu"] = self.gpu_layout.layout_id
        if "cpu" in self.tiers:
            ids["cpu"] = self.cpu_layout.layout_id
        return ids

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the bundle's bytes, for the manifest and for a resume to compare."""
        recipe: dict[str, Any] = {
            "tiers": list(self.tiers),
            "dense": "int8-absmax-per-row",
            "shard_bytes": self.shard_bytes,
        }
        if "gpu" in self.tiers:
            if self.gpu_format != "marlin":  # which recipes of before do not name
                recipe["gpu_format"] = self.gpu_format
            recipe["gpu_bits"] = self.gpu_bits
            recipe["gpu_group"] = "channel" if self.gpu_group is None else self.gpu_group
            recipe["gpu_scales"] = self.gpu_scales
        if "cpu" in self.tiers:
            recipe["cpu_format"] = self.cpu_format
        return recipe


def parse_tiers(text: str) -> tuple[Tier, ...]:
    """``gpu,cpu`` in any order to the order bundles use. Raises UsageError."""
    named = {word.strip() for word in text.split(",") if word.strip()}
    unknown = named - set(TIERS)
    if unknown or not named:
        raise UsageError("--tiers names gpu, cpu or both", got=text)
    return tuple(tier for tier in TIERS if tier in named)
