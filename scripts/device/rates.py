"""What the machine can do, measured with torch alone: the limits that the other stages are compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.device.context import Context
from scripts.device.timing import time_calls


def run(context: Context) -> dict[str, Any]:
    """GB/s and TFLOP/s; what the machine is."""
    return {"machine": machine(context), **measure(context)}


def measure(context: Context) -> dict[str, float]:
    """The rates themselves, in some seconds. GB = 10^9 bytes; a copy within a memory counts both ways."""
    copies = copy_rates(context)
    return {**copies, "matmul_tflops": matmul_tflops(context), "host_read_gbps": host_read_gbps()}


def copy_rates(context: Context) -> dict[str, float]:
    """Over the link, both ways, and within the device."""
    place, num_bytes = device_of(context), context.sizes.copy_bytes
    # ones, not empty: pages that were never written are all the same one.
    host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=context.is_cuda)
    one, other = (torch.ones(num_bytes, dtype=torch.uint8, device=place) for _ in range(2))

    def gbps(work: Callable[[], object], factor: int = 1) -> float:
        seconds = time_calls(work, synchronize(context), context.sizes.repeats).best_s
        return factor * num_bytes / seconds / 1e9

    return {
        "pinned_to_device_gbps": gbps(lambda: one.copy_(host, non_blocking=True)),
        "device_to_pinned_gbps": gbps(lambda: host.copy_(one, non_blocking=True)),
        "device_copy_gbps": gbps(lambda: other.copy_(one), 2),
    }


def matmul_tflops(context: Context) -> float:
    """A square bf16 product of random numbers."""
    size = context.sizes.matmul_size
    x, w = (torch.randn(size, size, device=device_of(context)).to(torch.bfloat16) for _ in range(2))
    timing = time_calls(lambda: torch.mm(x, w), synchronize(context), context.sizes.repeats)
    return float(2 * size**3 / timing.best_s / 1e12)


def device_of(context: Context) -> torch.device:
    return torch.device("cuda" if context.is_cuda else "cpu")


def synchronize(context: Context) -> Callable[[], object]:
    return torch.cuda.synchronize if context.is_cuda else int


def host_read_gbps() -> float:
    """All cores reading memory; 0 if it cannot be measured here."""
    from krasis.runtime.host import environment
    from krasis.runtime.host.read_bandwidth import measure_read_bandwidth

    notes: list[str] = []
    cpu, memory = environment.probe_cpu(), environment.probe_memory()
    figure = measure_read_bandwidth(cpu.l3_bytes, memory.available_bytes, notes)
    for note in notes:
        print(note)
    return float(figure.value) if figure is not None else 0.0


def machine(context: Context) -> dict[str, Any]:
    """Names and sizes."""
    facts: dict[str, Any] = {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": field_of("/proc/cpuinfo", "model name"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": os.uname().release,
        "torch": torch.__version__,
        "gpus": [],
    }
    if context.is_cuda:
        for index in range(torch.cuda.device_count()):
            one = torch.cuda.get_device_properties(index)
            facts["gpus"].append(
                {"name": one.name, "memory_bytes": one.total_memory, "sm": f"{one.major}{one.minor}"}
            )
    return facts


def field_of(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"
