"""The hardware a plan uses when no flag describes it: cores, RAM limit, and a quick read of memory at full
speed.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from krasis.formats import native
from krasis.formats.errors import KrasisError
from krasis.formats.files.aligned import aligned_empty
from krasis.runtime.host import environment
from krasis.runtime.planning.hardware import Figure, GpuSpec, HardwareSpec, describe_gpu, describe_host, given
from krasis.runtime.planning.measure_gpu import measured_spec

_MIB = 2**20
_CHUNK_BYTES = 8 * _MIB
_LEAST_BUFFER_BYTES = 256 * _MIB
_MOST_BUFFER_BYTES = 1024 * _MIB
_TOUCH_BUDGET_S = 0.25
_READ_BUDGET_S = 0.2
_MAX_REPEATS = 8


@dataclass(frozen=True, slots=True)
class HardwareFlags:
    """What the command line said; None means not said. Sizes in bytes, rates in 10^9/s (TFLOP/s: 10^12)."""

    gpu_vram_bytes: tuple[int, ...] | None = None
    pcie_gbps: float | None = None
    gpu_gbps: float | None = None
    gpu_tflops: float | None = None
    ram_bytes: int | None = None
    ram_gbps: float | None = None
    num_cpus: int | None = None
    cpu_gmacs: float | None = None
    disk_gbps: float | None = None


def hardware_from_flags(
    flags: HardwareFlags, shard: Path | None = None
) -> tuple[HardwareSpec, tuple[str, ...]]:
    """The machine described by the flags, completed by this one; and notes on what was chosen and why.

    shard: a file with GPU experts, with which in-place pinning is tried if the GPUs are this machine's. Once
    --ram or --cpus describes another host, nothing of this one is measured for it.
    """
    notes: list[str] = []
    gpus = _gpus(flags, notes)
    this_host = flags.ram_bytes is None and flags.num_cpus is None
    cpu = environment.probe_cpu()
    memory = environment.probe_memory()
    cores = _or_measured(flags.num_cpus, note="CPUs of this process's affinity mask", value=cpu.num_cpus)
    ram = _or_measured(flags.ram_bytes, note=memory.limit_reason, value=memory.limit_bytes)
    ram_gbps = given(flags.ram_gbps) if flags.ram_gbps is not None else None
    if ram_gbps is None and this_host:
        ram_gbps = measure_read_bandwidth(cpu.l3_bytes, memory.available_bytes, notes)
    hardware = describe_host(
        gpus,
        ram_bytes=ram,
        num_cores=cores,
        ram_gbps=ram_gbps,
        cpu_gmacs=given(flags.cpu_gmacs) if flags.cpu_gmacs is not None else None,
        disk_gbps=given(flags.disk_gbps) if flags.disk_gbps is not None else None,
        isa=(cpu.isa if this_host else "") or "avx2",
    )
    if flags.gpu_vram_bytes is None and gpus and shard is not None:
        hardware = replace(hardware, pins_files=_pins_files(shard, notes))
    return hardware, tuple(notes)


def _pins_files(shard: Path, notes: list[str]) -> bool:
    from krasis.runtime.host_memory.this_driver import why_not_in_place

    problem = why_not_in_place(shard)
    if problem:
        notes.append(f"experts are copied to an arena, for their files' pages cannot be pinned: {problem}")
    return not problem


def _or_measured(flag: int | None, *, note: str, value: int) -> Figure:
    return given(flag) if flag is not None else Figure(value, "measured", note)


def _gpus(flags: HardwareFlags, notes: list[str]) -> tuple[GpuSpec, ...]:
    sizes = flags.gpu_vram_bytes
    cuda_problem = environment.probe_libraries().cuda_problem
    if sizes is None:
        return tuple(_spec_of(device, flags, notes) for device in _this_machines_gpus(cuda_problem, notes))
    if sizes and cuda_problem:
        notes.append(f"this installation cannot use a GPU yet: {cuda_problem}")
    return tuple(_described(vram, flags) for vram in sizes)


def _described(vram_bytes: int, flags: HardwareFlags) -> GpuSpec:
    return describe_gpu(
        vram_bytes, link_gbps=flags.pcie_gbps, memory_gbps=flags.gpu_gbps, bf16_tflops=flags.gpu_tflops
    )


def _spec_of(device: environment.GpuInfo, flags: HardwareFlags, notes: list[str]) -> GpuSpec:
    """A GPU of this machine: measured, where no flag says otherwise."""
    described = _described(device.vram_bytes, flags)
    if None not in (flags.pcie_gbps, flags.gpu_gbps, flags.gpu_tflops):
        return described
    try:
        measured = measured_spec(device.index, device.vram_bytes)
    except KrasisError as error:
        notes.append(f"GPU {device.index} is not measured, its rates are assumed: {error}")
        return described
    return GpuSpec(
        device.vram_bytes,
        described.link_gbps if flags.pcie_gbps is not None else measured.link_gbps,
        described.memory_gbps if flags.gpu_gbps is not None else measured.memory_gbps,
        described.bf16_tflops if flags.gpu_tflops is not None else measured.bf16_tflops,
    )


def _this_machines_gpus(cuda_problem: str, notes: list[str]) -> tuple[environment.GpuInfo, ...]:
    if not environment.nvidia_driver_loaded():
        notes.append("no GPU: no NVIDIA driver is loaded on this machine")
        return ()
    if cuda_problem:
        notes.append(f"no GPU is used: {cuda_problem}")
        return ()
    torch = environment.probe_torch()
    if torch.problem:
        notes.append(f"no GPU is used: {torch.problem}")
    return torch.devices


def measure_read_bandwidth(l3_bytes: int, available_bytes: int, notes: list[str]) -> Figure | None:
    """Reads a buffer larger than the L3 cache with every thread, in about half a second.

    None (with the reason in ``notes``) if the native library cannot.
    """
    most_bytes = min(max(_LEAST_BUFFER_BYTES, 4 * l3_bytes), _MOST_BUFFER_BYTES)
    most_bytes = max(min(most_bytes, available_bytes // 8), _CHUNK_BYTES)
    try:
        rate, num_bytes = _best_rate(most_bytes - most_bytes % _CHUNK_BYTES)
    except KrasisError as error:
        notes.append(f"RAM bandwidth is not measured: {error}")
        return None
    except AttributeError:
        notes.append("RAM bandwidth is not measured: the native library lacks krasis_read_bandwidth")
        return None
    if num_bytes < 2 * l3_bytes:
        notes.append(f"RAM bandwidth may include the L3 cache: only {num_bytes // _MIB} MiB were read")
    return Figure(rate / 1e9, "measured", f"best of reads of {num_bytes // _MIB} MiB by all threads")


def _best_rate(most_bytes: int) -> tuple[float, int]:
    """(bytes/s of the fastest pass, bytes read in one). Raises NativeError or ResourceError."""
    read = native.library().krasis_read_bandwidth
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_double)]
    read.restype = ctypes.c_int32
    seconds = ctypes.c_double()
    best = 0.0
    buffer = aligned_empty(most_bytes)  # huge pages where decode gets them too
    address = buffer.ctypes.data
    with native.Pool() as pool:
        num_bytes = _touch(address, most_bytes, pool.num_threads)
        start = time.monotonic()
        for _ in range(_MAX_REPEATS):
            status = read(pool.handle, address, num_bytes, ctypes.byref(seconds))
            native.check(status, "krasis_read_bandwidth")
            best = max(best, num_bytes / max(seconds.value, 1e-9))
            if time.monotonic() - start > _READ_BUDGET_S:
                break
    return best, num_bytes


def _touch(address: int, most_bytes: int, num_threads: int) -> int:
    """Writes to the buffer until the time is up; bytes written. (Unwritten pages are all one zero page.)"""
    deadline = time.monotonic() + _TOUCH_BUDGET_S
    num_bytes = 0
    with ThreadPoolExecutor(num_threads) as threads:
        while num_bytes < most_bytes and (num_bytes == 0 or time.monotonic() < deadline):
            round_bytes = min(num_threads * _CHUNK_BYTES, most_bytes - num_bytes)
            chunks = range(address + num_bytes, address + num_bytes + round_bytes, _CHUNK_BYTES)
            list(threads.map(_fill, chunks))  # ctypes lets go of the interpreter's lock
            num_bytes += round_bytes
    return num_bytes


def _fill(address: int) -> None:
    ctypes.memset(address, 1, _CHUNK_BYTES)
