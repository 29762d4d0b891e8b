"""The hardware a plan is for: what flags say, completed by probes of this machine, which are handed in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from krasis.formats.errors import KrasisError
from krasis.runtime.planning.hardware import Figure, GpuSpec, HardwareSpec, describe_gpu, describe_host, given


@dataclass(frozen=True, slots=True)
class HardwareFlags:
    """What the command line said; None means not said. Sizes in bytes, rates in 10^9/s (TFLOP/s: 10^12).

    gpus, memory: what named hardware has.
    """

    gpu_vram_bytes: tuple[int, ...] | None = None
    gpus: tuple[GpuSpec, ...] | None = None
    memory: Figure | None = None
    pcie_gbps: float | None = None
    gpu_gbps: float | None = None
    gpu_tflops: float | None = None
    ram_bytes: int | None = None
    ram_gbps: float | None = None
    num_cpus: int | None = None
    cpu_gmacs: float | None = None
    disk_gbps: float | None = None


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What is known of the host without measuring. isa: of its kernels, empty if none runs on it. ram_reason:
    what limits the RAM.
    """

    num_cpus: int
    isa: str
    ram_bytes: int
    ram_reason: str


@dataclass(frozen=True, slots=True)
class GpuFound:
    """A GPU at hand: its number and its VRAM."""

    index: int
    vram_bytes: int


class Probes(Protocol):
    """Questions about this machine, which cost time: asked only where no flag answers."""

    def host(self) -> HostFacts:
        """Cores and RAM."""

    def why_no_gpu(self) -> str:
        """Why this installation cannot use GPUs; empty if it can."""

    def gpus(self) -> tuple[tuple[GpuFound, ...], str]:
        """The GPUs at hand, and why there are none."""

    def measure_gpu(self, gpu: GpuFound) -> GpuSpec:
        """Its rates. Raises KrasisError."""

    def measure_ram(self) -> tuple[Figure | None, tuple[str, ...]]:
        """The read bandwidth in GB/s, None if it cannot be measured, and notes."""

    def why_not_in_place(self) -> str | None:
        """Why the pages of the bundle's files cannot be pinned; empty if they can, None without a bundle."""


def hardware_from_flags(flags: HardwareFlags, probes: Probes) -> tuple[HardwareSpec, tuple[str, ...]]:
    """The machine described by the flags, completed by this one; and notes on what was chosen and why.

    In-place pinning is tried if the GPUs are this machine's. Once --ram or --cpus describes another host,
    nothing of this one is measured for it.
    """
    notes: list[str] = []
    gpus = _gpus(flags, probes, notes)
    this_host = flags.ram_bytes is None and flags.num_cpus is None
    host = probes.host()
    ram_gbps = given(flags.ram_gbps) if flags.ram_gbps is not None else flags.memory
    if ram_gbps is None and this_host:
        ram_gbps, more = probes.measure_ram()
        notes.extend(more)
    hardware = describe_host(
        gpus,
        ram_bytes=_or_measured(flags.ram_bytes, note=host.ram_reason, value=host.ram_bytes),
        num_cores=_or_measured(
            flags.num_cpus, note="CPUs of this process's affinity mask", value=host.num_cpus
        ),
        ram_gbps=ram_gbps,
        cpu_gmacs=given(flags.cpu_gmacs) if flags.cpu_gmacs is not None else None,
        disk_gbps=given(flags.disk_gbps) if flags.disk_gbps is not None else None,
        isa=(host.isa if this_host else "") or "avx2",
    )
    if flags.gpu_vram_bytes is None and flags.gpus is None and gpus:
        hardware = replace(hardware, pins_files=_pins_files(probes, notes))
    return hardware, tuple(notes)


def _pins_files(probes: Probes, notes: list[str]) -> bool:
    problem = probes.why_not_in_place()
    if problem:
        notes.append(f"experts are copied to an arena, for their files' pages cannot be pinned: {problem}")
    return problem == ""


def _or_measured(flag: int | None, *, note: str, value: int) -> Figure:
    return given(flag) if flag is not None else Figure(value, "measured", note)


def _gpus(flags: HardwareFlags, probes: Probes, notes: list[str]) -> tuple[GpuSpec, ...]:
    sizes = flags.gpu_vram_bytes
    if flags.gpus is not None:
        if problem := probes.why_no_gpu():
            notes.append(f"this installation cannot use a GPU yet: {problem}")
        return tuple(_completed(spec, flags) for spec in flags.gpus)
    if sizes is None:
        found, problem = probes.gpus()
        if problem:
            notes.append(problem)
        return tuple(_spec_of(gpu, flags, probes, notes) for gpu in found)
    problem = probes.why_no_gpu() if sizes else ""
    if problem:
        notes.append(f"this installation cannot use a GPU yet: {problem}")
    return tuple(_described(vram, flags) for vram in sizes)


def _completed(spec: GpuSpec, flags: HardwareFlags) -> GpuSpec:
    """What a flag says goes before what is known of the GPU's name."""
    return replace(
        spec,
        link_gbps=spec.link_gbps if flags.pcie_gbps is None else given(flags.pcie_gbps),
        memory_gbps=spec.memory_gbps if flags.gpu_gbps is None else given(flags.gpu_gbps),
        bf16_tflops=spec.bf16_tflops if flags.gpu_tflops is None else given(flags.gpu_tflops),
    )


def _described(vram_bytes: int, flags: HardwareFlags) -> GpuSpec:
    return describe_gpu(
        vram_bytes, link_gbps=flags.pcie_gbps, memory_gbps=flags.gpu_gbps, bf16_tflops=flags.gpu_tflops
    )


def _spec_of(gpu: GpuFound, flags: HardwareFlags, probes: Probes, notes: list[str]) -> GpuSpec:
    """A GPU of this machine: measured, where no flag says otherwise."""
    described = _described(gpu.vram_bytes, flags)
    if None not in (flags.pcie_gbps, flags.gpu_gbps, flags.gpu_tflops):
        return described
    try:
        measured = probes.measure_gpu(gpu)
    except KrasisError as error:
        notes.append(f"GPU {gpu.index} is not measured, its rates are assumed: {error}")
        return described
    return GpuSpec(
        gpu.vram_bytes,
        described.link_gbps if flags.pcie_gbps is not None else measured.link_gbps,
        described.memory_gbps if flags.gpu_gbps is not None else measured.memory_gbps,
        described.bf16_tflops if flags.gpu_tflops is not None else measured.bf16_tflops,
    )
