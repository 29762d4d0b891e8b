"""GPUs and memory by their names: sizes and attainable rates, with where they are from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from krasis.formats.errors import UsageError
from krasis.formats.units import MAX_GPUS
from krasis.runtime.planning.hardware import GIB, Figure, GpuSpec

MATMUL_SHARE = 0.7
"""What large matrix products reach of a GPU's dense peak."""
MEMORY_SHARE = 0.82
"""What reading reaches of the channels' peak (140 of 170.6 GB/s with 8 of DDR4-2666)."""

_LINK_GBPS = {"PCIe 4.0 x8": 13.0, "PCIe 4.0 x16": 25.0, "PCIe 5.0 x8": 25.0, "PCIe 5.0 x16": 55.0}
_PAPERS = {
    "ampere": "NVIDIA's GA102 architecture paper",
    "ada": "NVIDIA's Ada architecture paper",
    "blackwell": "NVIDIA's RTX Blackwell architecture paper",
    "sheet": "NVIDIA's data sheet",
}


@dataclass(frozen=True, slots=True)
class NamedGpu:
    """vram_gib: that programs see. memory_gbps, peak_tflops: the maker's (dense bf16, sums in f32)."""

    vram_gib: float
    memory_gbps: float
    peak_tflops: float
    link: str
    source: str

    def spec(self, name: str) -> GpuSpec:
        """With attainable rates."""
        source = _PAPERS[self.source]
        return GpuSpec(
            vram_bytes=int(self.vram_gib * GIB),
            link_gbps=Figure(_LINK_GBPS[self.link], "assumed", f"{name}, {self.link}"),
            memory_gbps=Figure(self.memory_gbps, "assumed", f"{name}, {source}"),
            bf16_tflops=Figure(
                MATMUL_SHARE * self.peak_tflops,
                "assumed",
                f"{MATMUL_SHARE:g} of {self.peak_tflops:g}, {source}",
            ),
        )


GPUS: Mapping[str, NamedGpu] = {
    "rtx3090": NamedGpu(24, 936, 71, "PCIe 4.0 x16", "ampere"),
    "rtx3090ti": NamedGpu(24, 1008, 80, "PCIe 4.0 x16", "ampere"),
    "rtxa4000": NamedGpu(16, 448, 76.7, "PCIe 4.0 x16", "sheet"),
    "rtxa5000": NamedGpu(24, 768, 111.1, "PCIe 4.0 x16", "sheet"),
    "rtxa6000": NamedGpu(48, 768, 154.8, "PCIe 4.0 x16", "sheet"),
    "rtx4070": NamedGpu(12, 504, 58.3, "PCIe 4.0 x16", "ada"),
    "rtx4080": NamedGpu(16, 717, 97.5, "PCIe 4.0 x16", "ada"),
    "rtx4090": NamedGpu(24, 1008, 165.2, "PCIe 4.0 x16", "ada"),
    "rtx2000ada": NamedGpu(16, 224, 48, "PCIe 4.0 x8", "sheet"),
    "rtx6000ada": NamedGpu(48, 960, 364, "PCIe 4.0 x16", "sheet"),
    "l4": NamedGpu(23, 300, 121, "PCIe 4.0 x16", "sheet"),
    "l40s": NamedGpu(47, 864, 362, "PCIe 4.0 x16", "sheet"),
    "rtx5080": NamedGpu(16, 960, 112.6, "PCIe 5.0 x16", "blackwell"),
    "rtx5090": NamedGpu(32, 1792, 209.5, "PCIe 5.0 x16", "blackwell"),
    "a100-40gb": NamedGpu(40, 1555, 312, "PCIe 4.0 x16", "sheet"),
    "a100-80gb": NamedGpu(80, 2039, 312, "PCIe 4.0 x16", "sheet"),
    "h100-pcie": NamedGpu(80, 2000, 756, "PCIe 5.0 x16", "sheet"),
    "h100": NamedGpu(80, 3350, 989, "PCIe 5.0 x16", "sheet"),
    "h200": NamedGpu(140, 4800, 989, "PCIe 5.0 x16", "sheet"),
}
_ALIASES = {
    "a4000": "rtxa4000",
    "a5000": "rtxa5000",
    "a6000": "rtxa6000",
    "a100": "a100-80gb",
    "h100-sxm": "h100",
}
_PATTERNS = (
    r"(?P<name>.+)",
    r"(?P<count>\d{1,4})[x*](?P<name>.+)",
    r"(?P<name>.+)[x*](?P<count>\d{1,4})",
)
_MEMORY = re.compile(r"(\d{1,3})\s*[x*]\s*ddr([345])-(\d{3,5})", re.ASCII | re.IGNORECASE)


def named_gpus(text: str, where: str = "--gpu") -> tuple[GpuSpec, ...]:
    """``rtx4090x2``, ``2xrtx4090``, ``rtx3090,h100``. Raises UsageError that lists the names there are."""
    specs: list[GpuSpec] = []
    for part in text.lower().replace(" ", "").split(","):
        name, count = _counted(part)
        if name not in GPUS:
            raise UsageError(
                "no GPU of this name is known",
                where=where,
                got=part,
                limit=", ".join(GPUS),
                hint="give its VRAM by --gpus and its rates by --pcie-gbps, --gpu-gbps and --gpu-tflops",
            )
        if not 1 <= count <= MAX_GPUS - len(specs):
            limit = f"1 to {MAX_GPUS}"
            raise UsageError("number of GPUs is out of range", where=where, got=text, limit=limit)
        specs += [GPUS[name].spec(name)] * count
    return tuple(specs)


def _counted(part: str) -> tuple[str, int]:
    """(name, number) of ``2xrtx4090`` and ``rtx4090x2``: names may have an x and digits themselves."""
    for pattern in _PATTERNS:
        match = re.fullmatch(pattern, part, re.ASCII)
        if match is not None and (name := _known(match["name"])) in GPUS:
            return name, int(match.groupdict().get("count") or 1)
    return part, 1


def _known(name: str) -> str:
    name = name.removeprefix("nvidia-")
    return _ALIASES.get(name, name)


def memory_gbps(text: str, where: str = "--memory") -> Figure:
    """The read bandwidth of ``8xDDR4-2666``: channels, and transfers of 8 bytes in millions a second.

    Raises UsageError.
    """
    match = _MEMORY.fullmatch(text.strip())
    channels, rate = (int(match[1]), int(match[3])) if match else (0, 0)
    if match is None or not 1 <= channels <= 64 or not 400 <= rate <= 16000:
        raise UsageError(
            "not a memory's name", where=where, got=text, hint="write channels and kind like 8xDDR4-2666"
        )
    peak = channels * rate * 8 / 1000
    note = f"{MEMORY_SHARE:g} of {peak:.4g}: {channels} channels of DDR{match[2]}-{rate}, 8 bytes each"
    return Figure(MEMORY_SHARE * peak, "assumed", note)
