"""The machine a plan is made for. Every figure carries where it comes from: given, measured or assumed.

The assumed figures are attainable rates, not those of a data sheet, and each note says what they were taken
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from krasis.formats.errors import UsageError

Source = Literal["given", "measured", "assumed"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Figure:
    """A positive number and its source. ``note`` says how it was measured or why it was assumed."""

    value: float
    source: Source
    note: str = ""


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU. Rates in 10^9 bytes/s of its link (host to device, pinned) and its memory; 10^12 bf16 FLOP/s
    of a matmul.
    """

    vram_bytes: int
    link_gbps: Figure
    memory_gbps: Figure
    bf16_tflops: Figure


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """A host and its GPUs. ``cpu_gmacs``: 10^9 int8 multiply-adds a second over all cores.

    pins_files: whether a mapped file's page cache can be pinned where it lies; known of this machine only.
    """

    gpus: tuple[GpuSpec, ...]
    ram_bytes: Figure
    ram_gbps: Figure
    num_cores: Figure
    cpu_gmacs: Figure
    disk_gbps: Figure
    pins_files: bool = False


@dataclass(frozen=True, slots=True)
class _GpuClass:
    up_to_bytes: int
    link_gbps: float
    memory_gbps: float
    bf16_tflops: float
    note: str


# By VRAM, because a flag like 3x16GiB tells no more. Matmul rates are about 0.7 of dense peak.
_GPU_CLASSES = (
    _GpuClass(20 * GIB, 13.0, 224.0, 34.0, "as RTX 2000 Ada, PCIe 4.0 x8"),
    _GpuClass(32 * GIB, 25.0, 936.0, 50.0, "as RTX 3090, PCIe 4.0 x16"),
    _GpuClass(64 * GIB, 25.0, 768.0, 120.0, "as RTX A6000/L40-class, PCIe 4.0 x16"),
    _GpuClass(100 * GIB, 55.0, 3350.0, 600.0, "as H100 SXM, PCIe 5.0 x16"),
    _GpuClass(2**60, 55.0, 4800.0, 600.0, "as H200, PCIe 5.0 x16"),
)

# One thread of ik_llama.cpp's repacked prefill: 137 (AVX-512 VNNI) and about 80 (AVX2), measured. Less is
# assumed for many cores. AMX: 1.2 times AVX-512 VNNI's rate, as measured with 64 and more rows an expert.
GMACS_PER_CORE = {"amx_int8": 130.0, "avx512_vnni": 110.0, "avx2": 50.0}
RAM_GBPS_PER_CORE = 12.0
RAM_GBPS_CEILING = 140.0
DISK_GBPS = 3.0


def describe_gpu(
    vram_bytes: int,
    *,
    link_gbps: float | None = None,
    memory_gbps: float | None = None,
    bf16_tflops: float | None = None,
) -> GpuSpec:
    """A GPU of ``vram_bytes``; rates that are not given are assumed from its size."""
    guess = next(gpu_class for gpu_class in _GPU_CLASSES if vram_bytes <= gpu_class.up_to_bytes)
    return GpuSpec(
        vram_bytes=vram_bytes,
        link_gbps=given_or(link_gbps, guess.link_gbps, guess.note),
        memory_gbps=given_or(memory_gbps, guess.memory_gbps, guess.note),
        bf16_tflops=given_or(bf16_tflops, guess.bf16_tflops, f"{guess.note}, 0.7 of peak"),
    )


def describe_host(
    gpus: Sequence[GpuSpec],
    *,
    ram_bytes: Figure,
    num_cores: Figure,
    ram_gbps: Figure | None = None,
    cpu_gmacs: Figure | None = None,
    disk_gbps: Figure | None = None,
    isa: str = "avx2",
) -> HardwareSpec:
    """A machine; rates that are not known are assumed from its cores. Raises UsageError for an unknown
    ``isa``.
    """
    if isa not in GMACS_PER_CORE:
        raise UsageError("unknown instruction set", got=isa, limit=", ".join(GMACS_PER_CORE))
    if ram_gbps is None:
        rate = min(RAM_GBPS_CEILING, RAM_GBPS_PER_CORE * num_cores.value)
        note = f"{RAM_GBPS_PER_CORE:g} GB/s a core, at most {RAM_GBPS_CEILING:g} (8 channels of DDR4-2666)"
        ram_gbps = Figure(rate, "assumed", note)
    if cpu_gmacs is None:
        per_core = GMACS_PER_CORE[isa]
        cpu_gmacs = Figure(per_core * num_cores.value, "assumed", f"{per_core:g} a core, {isa}")
    if disk_gbps is None:
        disk_gbps = Figure(DISK_GBPS, "assumed", "an NVMe drive")
    return HardwareSpec(tuple(gpus), ram_bytes, ram_gbps, num_cores, cpu_gmacs, disk_gbps)


def given_or(value: float | None, assumed: float, note: str) -> Figure:
    """``value`` as given, or the assumed one with its note. Raises UsageError unless it is positive."""
    if value is None:
        return Figure(assumed, "assumed", note)
    return given(value)


def given(value: float) -> Figure:
    """A figure from the command line. Raises UsageError unless it is positive and finite."""
    if not 0 < value < float("inf"):
        raise UsageError("a rate or size must be a positive number", got=value)
    return Figure(value, "given")
