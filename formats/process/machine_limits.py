"""What this process may take of the machine: memory and CPUs. The one place that every plan asks.

Memory is bounded by what the machine can give without swapping, by every control group above the process, and
by its own ``ulimit``; CPUs by the affinity mask (cpusets show there) and by the groups' quota of time.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from krasis.formats.process.control_groups import cpu_quota, limited_groups
from krasis.formats.process.mount_table import read_text


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """Bytes of memory. total_bytes: the machine's. limit_bytes: the smaller of that and the tightest control
    group, limit_reason says which. available_bytes: what can still be had without swapping, the page cache
    counted as free; available_reason: what bounds it, in a few words.
    """

    total_bytes: int
    limit_bytes: int
    limit_reason: str
    available_bytes: int
    available_reason: str


def memory_limits(root: Path = Path("/")) -> MemoryLimits | None:
    """What memory this process may take; None where the system does not say. root: stands for the file
    system's root, so that tests can show another machine's files.
    """
    info = meminfo(root)
    groups = limited_groups(root)
    bounds = [(group.available_bytes, "the control group's limit") for group in groups]
    bounds += _own_limits(root)
    total = info.get("MemTotal", 0)
    free = info.get("MemAvailable", total)
    if total:
        bounds.append((free, "the machine's free memory"))
    if not bounds:
        return None
    limit, limit_reason = total, "all of the RAM"
    tightest = min((group.limit_bytes for group in groups), default=None)
    if tightest is not None and (tightest < total or not total):
        limit, limit_reason = tightest, "the cgroup's limit"
    available, reason = min(bounds)
    return MemoryLimits(total, limit, limit_reason, available, reason)


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be had without swapping, page cache included, within every limit of this process; None
    where the system does not say.
    """
    limits = memory_limits(root)
    return None if limits is None else limits.available_bytes


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs to use by default, at least 1: those of the affinity mask, but no more than the control groups'
    quota pays for. A thread too many would wait in turn for time that another one spent waiting.
    """
    affinity = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def meminfo(root: Path = Path("/")) -> dict[str, int]:
    """The lines of /proc/meminfo that are sizes, in bytes; empty where there is none."""
    text = read_text(root / "proc/meminfo")
    lines = re.finditer(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)
    return {line.group(1): int(line.group(2)) * 1024 for line in lines}


def address_space_hint() -> str:
    """How to lift ``ulimit -v``, for errors of mapping; empty where it is not set."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return ""
    return f"ulimit -v allows this process {soft >> 20} MiB of addresses: raise it (ulimit -v unlimited)"


def _own_limits(root: Path) -> Iterator[tuple[int, str]]:
    """What ``ulimit`` leaves: address space (-v) and data (-d), less what the process has of each."""
    status = read_text(root / "proc/self/status")
    for kind, field, name in (
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
    ):
        soft, _ = resource.getrlimit(kind)
        if soft == resource.RLIM_INFINITY:
            continue
        match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
        used = int(match.group(1)) * 1024 if match else 0
        yield max(0, soft - used), name
