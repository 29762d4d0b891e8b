"""The planner's questions about this machine, answered by asking it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krasis.runtime.host import environment
from krasis.runtime.host.measure_gpu import measured_spec
from krasis.runtime.host.read_bandwidth import measure_read_bandwidth
from krasis.runtime.planning.hardware import Figure, GpuSpec
from krasis.runtime.planning.probes import GpuFound, HostFacts


@dataclass(frozen=True, slots=True)
class ThisMachine:
    """The probes of ``planning.probes``. shard: a file with GPU experts, if there is one, with which
    in-place pinning is tried.
    """

    shard: Path | None = None

    def host(self) -> HostFacts:
        """Cores of the affinity mask, RAM within the cgroup's limit."""
        cpu, memory = environment.probe_cpu(), environment.probe_memory()
        return HostFacts(cpu.num_cpus, cpu.isa, memory.limit_bytes, memory.limit_reason)

    def why_no_gpu(self) -> str:
        """Of the installed libraries."""
        return environment.probe_libraries().cuda_problem

    def gpus(self) -> tuple[tuple[GpuFound, ...], str]:
        """Those that torch finds, where a driver is loaded and the CUDA library is built."""
        if not environment.nvidia_driver_loaded():
            return (), "no GPU: no NVIDIA driver is loaded on this machine"
        if problem := self.why_no_gpu():
            return (), f"no GPU is used: {problem}"
        torch = environment.probe_torch()
        found = tuple(GpuFound(device.index, device.vram_bytes) for device in torch.devices)
        return found, f"no GPU is used: {torch.problem}" if torch.problem else ""

    def measure_gpu(self, gpu: GpuFound) -> GpuSpec:
        """In about a second. Raises ResourceError."""
        return measured_spec(gpu.index, gpu.vram_bytes)

    def measure_ram(self) -> tuple[Figure | None, tuple[str, ...]]:
        """By all threads, in about half a second."""
        notes: list[str] = []
        l3_bytes, available_bytes = (
            environment.probe_cpu().l3_bytes,
            environment.probe_memory().available_bytes,
        )
        return measure_read_bandwidth(l3_bytes, available_bytes, notes), tuple(notes)

    def why_not_in_place(self) -> str | None:
        """By the driver, with 2 MiB of the file."""
        if self.shard is None:
            return None
        from krasis.runtime.host_memory.this_driver import why_not_in_place

        return why_not_in_place(self.shard)
