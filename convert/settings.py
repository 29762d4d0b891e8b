"""What the user chose: validated settings of one conversion, and the recipe a bundle records of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from krasis.formats.bundle.shard_output import OUTPUT_IO, OutputIo
from krasis.formats.errors import UsageError
from krasis.formats.layouts import CpuTileLayout, Int8RowsLayout, MarlinLayout

Tier = Literal["gpu", "cpu"]
TIERS: tuple[Tier, ...] = ("gpu", "cpu")
GPU_GROUPS: dict[str, int | None] = {"32": 32, "64": 64, "128": 128, "channel": None}
GPU_SCALES = {"bf16": "BF16", "f16": "F16"}
CPU_FORMATS = {"q8": "q8", "int4": "i4"}
MIN_SHARD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ConvertSettings:
    """Everything that is not an input. The first block decides the bundle's bytes; the second does not.

    gpu_group: input features a scale covers, None = all of them. num_threads: 0 = every CPU of this process.
    memory_limit_bytes: bound on memory beyond the page cache, None = what the machine has available.
    output_io: whether shards are written past the page cache. force_text: go on without text files that
    cannot be used. force_weights: weights that look damaged are told, and converted as they are.
    """

    tiers: tuple[Tier, ...] = TIERS
    gpu_bits: Literal[4, 8] = 4
    gpu_group: int | None = 128
    gpu_scales: Literal["bf16", "f16"] = "bf16"
    cpu_format: Literal["q8", "int4"] = "q8"
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
        if self.shard_bytes < MIN_SHARD_BYTES:
            raise UsageError(
                "--shard-size is too small", got=f"{self.shard_bytes} bytes", limit="1 MiB or more"
            )
        if self.output_io not in OUTPUT_IO:
            raise UsageError("unknown --output-io", got=self.output_io, limit=", ".join(OUTPUT_IO))
        if self.num_threads < 0:
            raise UsageError("--threads must not be negative", got=self.num_threads)

    @property
    def gpu_layout(self) -> MarlinLayout:
        """How GPU experts are packed."""
        return MarlinLayout(self.gpu_bits, self.gpu_group, GPU_SCALES[self.gpu_scales])

    @property
    def cpu_layout(self) -> CpuTileLayout:
        """How CPU experts are packed."""
        return CpuTileLayout(CPU_FORMATS[self.cpu_format])

    def layout(self, tier: str) -> MarlinLayout | CpuTileLayout:
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
