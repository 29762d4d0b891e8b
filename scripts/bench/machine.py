"""What the benchmark ran on, and how busy it was."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")


def load_1m() -> float:
    """Runnable processes, averaged over a minute."""
    return os.getloadavg()[0]


def machine_facts() -> dict[str, str | int | float]:
    """Everything that a reader needs to judge the figures."""
    cpu = _proc_fields("/proc/cpuinfo")
    memory = _proc_fields("/proc/meminfo")
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", "unknown"),
        "cpu_family_model": f"family {cpu.get('cpu family', '?')} model {cpu.get('model', '?')}",
        "cpu_flags": " ".join(flag for flag in CPU_FLAGS if flag in flags),
        "num_cpus": len(os.sched_getaffinity(0)),
        "l3": _read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "virtual": "yes" if "hypervisor" in flags else "no",
        "memory_gib": round(int(memory.get("MemTotal", "0 kB").split()[0]) / 2**20, 1),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gpus": ", ".join(gpu_names()) or "none",
    }


def gpu_names() -> list[str]:
    """One name a GPU that nvidia-smi lists; none without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return (
        [line.strip() for line in result.stdout.splitlines() if line.strip()] if not result.returncode else []
    )


def compute_capability() -> str:
    """The compute capability of the first GPU, such as 90; empty without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    lines = result.stdout.split()
    return lines[0].replace(".", "") if not result.returncode and lines else ""


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text().strip() if file.exists() else "unknown"


def _proc_fields(path: str) -> dict[str, str]:
    """``name: value`` lines; the first of each name."""
    fields: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields
