"""The environment as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from krasis.formats.text_tables import text_fields, text_paragraphs
from krasis.formats.units import format_binary
from krasis.runtime.host.environment import Cpu, Environment, Memory, NativeLibraries, Torch


def environment_to_json(found: Environment) -> dict[str, Any]:
    """Plain JSON types, sizes in bytes."""
    return asdict(found)


def environment_to_text(found: Environment) -> str:
    """The human form; the last part says what is off and why."""
    parts = [
        "CPU\n" + text_fields(_cpu_fields(found.cpu)),
        "Memory\n" + text_fields(_memory_fields(found.memory)),
        "Native libraries\n" + text_fields(_library_fields(found.libraries)),
    ]
    if found.torch is not None:
        parts.append("torch\n" + text_fields(_torch_fields(found.torch)))
    findings = text_paragraphs(found.findings) or "  nothing"
    return "\n\n".join([*parts, "What is off, and why\n" + findings])


def _cpu_fields(cpu: Cpu) -> list[tuple[str, str]]:
    caches = (
        f"L2 {format_binary(cpu.l2_bytes)}, L3 {format_binary(cpu.l3_bytes)}" if cpu.l3_bytes else "unknown"
    )
    return [
        ("model", cpu.brand),
        ("features", " ".join(cpu.features) or "none that matter here"),
        ("kernels", f"{cpu.isa or 'none'}: {cpu.isa_reason}"),
        ("CPUs", f"{cpu.num_cpus} of {cpu.num_online_cpus} usable, {cpu.num_numa_nodes} NUMA node(s)"),
        ("caches", caches),
    ]


def _memory_fields(memory: Memory) -> list[tuple[str, str]]:
    locked = memory.locked_limit_bytes
    return [
        ("RAM", f"{format_binary(memory.total_bytes)}, {format_binary(memory.available_bytes)} available"),
        ("limit", f"{format_binary(memory.limit_bytes)} ({memory.limit_reason})"),
        ("huge pages", f"anonymous '{memory.transparent_huge_pages}', tmpfs '{memory.shmem_huge_pages}'"),
        ("file huge pages", memory.file_huge_pages),
        ("locked memory", "unlimited" if locked is None else f"at most {format_binary(locked)}"),
    ]


def _library_fields(libraries: NativeLibraries) -> list[tuple[str, str]]:
    abi = f" (ABI {libraries.cpu_abi})" if libraries.cpu_abi is not None else ""
    cpu = libraries.cpu_problem or f"{libraries.cpu_path}{abi}"
    return [("CPU", cpu), ("CUDA", libraries.cuda_problem or libraries.cuda_path)]


def _torch_fields(torch: Torch) -> list[tuple[str, str]]:
    fields = [
        ("version", torch.version or "not usable"),
        ("CUDA", torch.cuda_version or "none"),
    ]
    for device in torch.devices:
        detail = f"{device.name}, {format_binary(device.vram_bytes)}, compute {device.compute_capability}"
        fields.append((f"device {device.index}", detail))
    if torch.problem:
        fields.append(("devices", f"none: {torch.problem}"))
    return fields
