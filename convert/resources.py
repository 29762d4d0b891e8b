"""What this machine has: memory, disk. Checked before a conversion begins; sampled while it runs."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from krasis.formats.errors import ResourceError
from krasis.formats.process.machine_limits import memory_limits
from krasis.formats.process.mount_table import filesystem_kind
from krasis.formats.units import format_bytes

# Directories, the manifest, text assets and the file system's own needs.
DISK_RESERVE_BYTES = 64 << 20
# A shard of one blob has at least a header beside it, and the blob begins at a huge page.
SHARD_HEADER_BYTES = 4 << 20
_FAT = ("vfat", "msdos", "umsdos")


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


def check_writable(out: Path) -> None:
    """Raises ResourceError where this user must not write: on a read-only disk, in another one's folder."""
    parent = existing_parent(out)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(
            "nothing can be written into the folder for the output",
            where=str(parent),
            hint="choose another folder with -o, or see to its permissions (is the disk mounted read-only?)",
        )


def check_file_size(out: Path, largest_bytes: int, largest_blob_bytes: int) -> None:
    """Raises ResourceError when a shard would be larger than a file may be: by ``ulimit -f``, or on a FAT
    disk.

    largest_bytes: of the shards as planned; largest_blob_bytes: the least that --shard-size can bring it to.
    """
    most, reason = _largest_file(out)
    if largest_bytes <= most:
        return
    smaller = most // 2**20
    fits = largest_blob_bytes + SHARD_HEADER_BYTES <= most
    raise ResourceError(
        "a file of the bundle would be larger than files may be here",
        where=str(out),
        got=format_bytes(largest_bytes),
        limit=f"{format_bytes(most)} ({reason})",
        hint=f"use --shard-size {smaller}MiB, or another disk"
        if fits
        else "choose another disk or raise that limit",
    )


def _largest_file(out: Path) -> tuple[int, str]:
    """The largest file that may be written there, and what says so."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [(soft, "ulimit -f")] if soft != resource.RLIM_INFINITY else []
    if (kind := filesystem_kind(existing_parent(out))) in _FAT:
        limits.append((2**32 - 1, f"the disk's file system, {kind}"))
    return min(limits, default=(2**63 - 1, ""))


def needed_disk_bytes(need_bytes: int, held_bytes: int) -> int:
    """What must still be free for an output of which ``held_bytes`` are on disk already."""
    return max(0, need_bytes - held_bytes) + DISK_RESERVE_BYTES


def check_disk(out: Path, need_bytes: int, held_bytes: int) -> None:
    """Raises ResourceError when the output does not fit; ``held_bytes`` of it are on disk already."""
    free = free_disk_bytes(out)
    still_needed = needed_disk_bytes(need_bytes, held_bytes)
    if free < still_needed:
        held = f", beyond the {format_bytes(held_bytes)} already written" if held_bytes else ""
        raise ResourceError(
            "not enough disk space for the bundle",
            where=str(out),
            got=f"{format_bytes(free)} free",
            limit=f"{format_bytes(still_needed)} needed{held}",
            hint="choose another disk with -o, free some of this one, or write fewer --tiers",
        )
