"""What the user chose: validated settings of one conversion, and the recipe a bundle records of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from krasis.formats.bundle.shard_output import OUTPUT_IO, OutputIo
from krasis.formats.checkpoints.quantised.kept import NO_CODES, KeptCodes
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

    gpu_format, cpu_format: names of ``formats.layouts``. gpu_group: input features a scale covers, None = all
    of them, ``auto`` = 128, or the most below that divide the model's sizes and the group of a source's
    symmetric codes of 4 bits. gpu_format ``auto``: ``marlin``,
    or ``mxfp4`` for experts that were released in MXFP4, unless something was asked for that it has not;
    cpu_format ``auto``: ``q8``, or ``mxfp4`` or ``int4`` for experts that the source has in such codes,
    which these keep. num_threads: 0 = every CPU of this process. memory_limit_bytes: bound on memory beyond
    the page cache, None = what the machine has available. output_io: whether shards are written past the page
    cache. force_text: go on without text files that cannot be used. force_weights: weights that look damaged
    are told, and converted as they are. mtp: take the layer that drafts, too.
    """

    tiers: tuple[Tier, ...] = TIERS
    gpu_bits: Literal[4, 8] = 4
    gpu_format: str = AUTO
    gpu_group: int | Literal["auto"] | None = "auto"
    gpu_scales: Literal["bf16", "f16"] = "bf16"
    cpu_format: str = AUTO
    shard_bytes: int = 32 << 30
    calibration: Path | None = None
    mtp: bool = False

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
            ("--gpu-format", self.gpu_format, (*GPU_FORMATS, AUTO)),
            ("--cpu-format", self.cpu_format, (*CPU_FORMATS, AUTO)),
        ):
            if name not in known:
                raise UsageError(f"unknown {option}", got=name, limit=", ".join(known))
        if self.gpu_format == "mxfp4" and self._names_marlin:
            raise UsageError(
                "--gpu-format mxfp4 has 4 bits and scales of its own for each 32",
                got=f"{self.gpu_bits} bits, group {self.gpu_group}, scales in {self.gpu_scales}",
                hint="leave out --gpu-bits, --gpu-group and --gpu-scales",
            )
        if self.shard_bytes < MIN_SHARD_BYTES:
            raise UsageError(
                "--shard-size is too small", got=f"{self.shard_bytes} bytes", limit="1 MiB or more"
            )
        if self.output_io not in OUTPUT_IO:
            raise UsageError("unknown --output-io", got=self.output_io, limit=", ".join(OUTPUT_IO))
        if self.num_threads < 0:
            raise UsageError("--threads must not be negative", got=self.num_threads)

    @property
    def _names_marlin(self) -> bool:
        """Whether something was asked for that MXFP4 has not."""
        return (self.gpu_bits, self.gpu_group, self.gpu_scales) != (4, "auto", "bf16")

    @property
    def gpu_layout(self) -> ExpertFormat:
        """How GPU experts are packed; before ``fitted``, ``auto`` is ``marlin``, with the largest group that
        there may be.
        """
        group = DEFAULT_GPU_GROUP if self.gpu_group == "auto" else self.gpu_group
        name = "marlin" if self.gpu_format == AUTO else self.gpu_format
        return GPU_FORMATS[name](self.gpu_bits, group, GPU_SCALES[self.gpu_scales])

    @property
    def cpu_layout(self) -> ExpertFormat:
        """How CPU experts are packed; before ``fitted``, ``auto`` is ``q8``."""
        return CPU_FORMATS["q8" if self.cpu_format == AUTO else self.cpu_format]

    def fitted(
        self, sizes: Iterable[int], cpu: KeptCodes = NO_CODES, gpu: KeptCodes = NO_CODES
    ) -> ConvertSettings:
        """These settings with a group and formats for ``auto``. sizes: input features of the model's
        experts; cpu, gpu: the codes of what they are made from.

        Raises UnsupportedModelError if no group divides them.
        """
        chosen = self
        if self.cpu_format == AUTO:
            chosen = replace(chosen, cpu_format=cpu.cpu_format or "q8")
        if self.gpu_format == AUTO:
            keeps = gpu.mxfp4 and not self._names_marlin
            chosen = replace(chosen, gpu_format="mxfp4" if keeps else "marlin")
        if self.gpu_group != "auto" or "gpu" not in self.tiers or chosen.gpu_format == "mxfp4":
            return chosen
        if gpu.group in (32, 64) and self.gpu_bits == 4:
            chosen = replace(chosen, gpu_group=gpu.group)
        return replace(chosen, gpu_group=chosen.gpu_layout.fitted(sizes).group_of(DEFAULT_GPU_GROUP))

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
            recipe |= self._gpu_recipe()
        if "cpu" in self.tiers:
            recipe["cpu_format"] = self.cpu_format
        if self.mtp:
            recipe["mtp"] = True
        return recipe

    def _gpu_recipe(self) -> dict[str, Any]:
        if self.gpu_format == "mxfp4":  # which leaves nothing to choose
            return {"gpu_format": self.gpu_format}
        recipe: dict[str, Any] = {"gpu_bits": self.gpu_bits}
        recipe["gpu_group"] = "channel" if self.gpu_group is None else self.gpu_group
        recipe["gpu_scales"] = self.gpu_scales
        return recipe


def parse_tiers(text: str) -> tuple[Tier, ...]:
    """``gpu,cpu`` in any order to the order bundles use. Raises UsageError."""
    named = {word.strip() for word in text.split(",") if word.strip()}
    unknown = named - set(TIERS)
    if unknown or not named:
        raise UsageError("--tiers names gpu, cpu or both", got=text)
    return tuple(tier for tier in TIERS if tier in named)
