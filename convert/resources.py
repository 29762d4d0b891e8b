"""What this machine has: memory, disk. Checked before a conversion begins; sampled while it runs."""

from __future__ import annotations

import os
from pathlib import Path

from krasis.convert.settings import format_bytes
from krasis.formats.errors import ResourceError
from krasis.formats.machine_limits import memory_limits

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


def usable_memory_bytes() -> int | None:
    """What a conversion may take in all: what can still be had, and what this process has taken already. None
    where the system does not say.
    """
    limits = memory_limits()
    return None if limits is None else limits.available_bytes + anonymous_bytes()


def check_memory(need_bytes: int) -> None:
    """Raises ResourceError when less can be had than the conversion's buffers need, naming what bounds it."""
    limits, usable = memory_limits(), usable_memory_bytes()
    if limits is not None and usable is not None and usable < need_bytes:
        raise ResourceError(
            "not enough free memory to convert",
            got=f"{format_bytes(usable)} available within {limits.available_reason}",
            limit=f"{format_bytes(need_bytes)} needed",
            hint="close other programs, raise that limit, or convert on another machine",
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
