"""What this machine has: memory, disk. Checked before a conversion begins; sampled while it runs."""

from __future__ import annotations

import os
from pathlib import Path

from krasis.convert.settings import format_bytes
from krasis.formats.errors import ResourceError

_CGROUP_MAX = Path("/sys/fs/cgroup/memory.max")
_CGROUP_CURRENT = Path("/sys/fs/cgroup/memory.current")
_CGROUP_STAT = Path("/sys/fs/cgroup/memory.stat")
# Directories, the manifest, text assets and the file system's own needs.
DISK_RESERVE_BYTES = 64 << 20


def _field_bytes(path: str, field: str) -> int | None:
    """A ``Name:  123 kB`` line of a /proc file in bytes, None where there is no such file or line."""
    try:
        text = Path(path).read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    return None


def anonymous_bytes() -> int:
    """This process's memory beyond the page cache (RssAnon), 0 where the kernel does not say."""
    return _field_bytes("/proc/self/status", "RssAnon") or 0


def available_memory_bytes() -> int | None:
    """Memory that can be allocated without swapping, within the container's limit. None if unknown."""
    machine = _field_bytes("/proc/meminfo", "MemAvailable")
    container = _cgroup_available_bytes()
    known = [value for value in (machine, container) if value is not None]
    return min(known) if known else None


def _cgroup_available_bytes() -> int | None:
    try:
        limit = _CGROUP_MAX.read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int(_CGROUP_CURRENT.read_text(encoding="ascii"))
        reclaimable = 0
        for line in _CGROUP_STAT.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "active_file"):
                reclaimable += int(value)
    except (OSError, ValueError):
        return None
    return int(limit) - used + reclaimable


def check_memory(need_bytes: int) -> None:
    """Raises ResourceError when the machine has less available than the conversion's buffers need."""
    available = available_memory_bytes()
    if available is not None and available < need_bytes:
        raise ResourceError(
            "not enough free memory to convert",
            got=f"{format_bytes(available)} available",
            limit=f"{format_bytes(need_bytes)} needed",
            hint="close other programs, or lower --memory-limit to use smaller buffers",
        )


def existing_parent(path: Path) -> Path:
    """The nearest ancestor of ``path`` that exists."""
    parent = path.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return parent


def free_disk_bytes(path: Path) -> int:
    """Free bytes of the file system that ``path`` would be on, for this user."""
    stat = os.statvfs(existing_parent(path))
    return stat.f_bavail * stat.f_frsize


def allocated_bytes(folder: Path) -> int:
    """Bytes on disk that the files of ``folder`` already hold; 0 if there is no such folder."""
    if not folder.is_dir():
        return 0
    return sum(
        entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(folder) if entry.is_file()
    )


def check_disk(out: Path, need_bytes: int, held_bytes: int) -> None:
    """Raises ResourceError when the output does not fit; ``held_bytes`` of it are on disk already."""
    free = free_disk_bytes(out)
    still_needed = max(0, need_bytes - held_bytes) + DISK_RESERVE_BYTES
    if free < still_needed:
        held = f", beyond the {format_bytes(held_bytes)} already written" if held_bytes else ""
        raise ResourceError(
            "not enough disk space for the bundle",
            where=str(out),
            got=f"{format_bytes(free)} free",
            limit=f"{format_bytes(still_needed)} needed{held}",
            hint="choose another disk with -o, or fewer --tiers",
        )
