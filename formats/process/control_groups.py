"""The limits that control groups set to this process, version 1 or 2: of its own group and of all above it.

The kernel names the group relative to the root of the reader's cgroup namespace, and mounts show a part of
the hierarchy: both are taken into account. What is above the part that is mounted cannot be seen; version 1
tells its limit nevertheless (``hierarchical_memory_limit``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from krasis.formats.process.mount_table import Mount, mounts, read_text

_UNLIMITED_BYTES = 2**60
_MAX_SEARCHED = 4096  # groups looked through where a namespace hides the way


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """A group with a limit. available_bytes: what of it is not in use but by the page cache."""

    limit_bytes: int
    available_bytes: int
    folder: Path


@dataclass(frozen=True, slots=True)
class _Names:
    """What one version calls its files and figures. limits: files with a limit of the whole group."""

    base: str
    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


# Above memory.high a group is slowed down until it stands still: a limit for whoever plans.
_VERSION_2 = _Names(
    "sys/fs/cgroup",
    ("memory.max", "memory.high"),
    "memory.current",
    ("active_file", "inactive_file", "slab_reclaimable"),
)
_VERSION_1 = _Names(
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)


def limited_groups(root: Path = Path("/")) -> list[GroupMemory]:
    """This process's group and those above it that limit memory. root: stands for the file system's root."""
    found = []
    for version, folder, is_own in _folders(root, "memory"):
        names = _VERSION_1 if version == 1 else _VERSION_2
        group = _group_memory(names, folder, is_own=is_own)
        if group is not None:
            found.append(group)
    return found


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that this process's groups allow it, such as 2.5; None without a limit."""
    quotas = []
    for version, folder, _ in _folders(root, "cpu"):
        if version == 1:
            quota, period = read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
        else:
            quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
        if quota.strip().isdecimal() and period.strip().isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _group_memory(names: _Names, folder: Path, *, is_own: bool) -> GroupMemory | None:
    if not is_own and read_text(folder / "memory.use_hierarchy").strip() == "0":
        return None  # of version 1: this group does not count what is below it
    limits = [int(text) for name in names.limits if (text := read_text(folder / name).strip()).isdecimal()]
    stat = read_text(folder / "memory.stat")
    limits += _figures(stat, ("hierarchical_memory_limit",))
    limit = min(limits, default=_UNLIMITED_BYTES)
    if limit >= _UNLIMITED_BYTES:
        return None
    usage = read_text(folder / names.usage).strip()
    used = int(usage) if usage.isdecimal() else 0
    cache = sum(_figures(stat, names.cache))
    return GroupMemory(limit, max(0, limit - max(0, used - cache)), folder)


def _figures(stat: str, names: tuple[str, ...]) -> list[int]:
    found = (re.search(rf"^{name} (\d+)$", stat, re.MULTILINE) for name in names)
    return [int(match.group(1)) for match in found if match]


# ---- where the groups are ----------------------------------------------------------------------------------


def _folders(root: Path, controller: str) -> Iterator[tuple[int, Path, bool]]:
    """(version, folder, whether it is the process's own group) from the own group upwards."""
    table = mounts(root)
    for line in read_text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if controllers == "":
            version, usual = 2, _VERSION_2.base
        elif controller in controllers.split(","):
            version, usual = 1, f"sys/fs/cgroup/{controller}"
        else:
            continue
        found = _mounted(version, controller, path, table, root)
        if not table:
            found = root / usual, tuple(part for part in path.split("/") if part not in ("", ".", ".."))
        if found is None:
            continue
        base, below = found
        for depth in range(len(below), -1, -1):
            yield version, base.joinpath(*below[:depth]), depth == len(below)


def _mounted(
    version: int, controller: str, path: str, table: list[Mount], root: Path
) -> tuple[Path, tuple[str, ...]] | None:
    """The mount that shows most of the hierarchy and the way in it to the process's group."""
    best: tuple[Path, tuple[str, ...]] | None = None
    for mount in table:
        if mount.kind != ("cgroup" if version == 1 else "cgroup2"):
            continue
        if version == 1 and controller not in mount.options:
            continue
        base = root / mount.point.lstrip("/")
        below = _below(path, mount.root)
        if below is None:
            below = _searched(base, path, mount.root)
        if below is not None and (best is None or len(below) > len(best[1])):
            best = base, below
    return best


def _below(path: str, mounted: str) -> tuple[str, ...] | None:
    """The way from the mounted folder to the group; None if the group is outside, or the way has no names."""
    group, top = PurePosixPath(path).parts[1:], PurePosixPath(mounted).parts[1:]
    if ".." in group or ".." in top or group[: len(top)] != top:
        return None
    return group[len(top) :]


def _searched(base: Path, path: str, mounted: str) -> tuple[str, ...] | None:
    """The way to the group that lists this process, where ``..`` in a name says that a namespace hides it."""
    if ".." not in PurePosixPath(path).parts and ".." not in PurePosixPath(mounted).parts:
        return None
    own, waiting, num_seen = str(os.getpid()), [base], 0
    while waiting and num_seen < _MAX_SEARCHED:
        folder = waiting.pop()
        num_seen += 1
        if own in read_text(folder / "cgroup.procs").split():
            return folder.relative_to(base).parts
        try:
            waiting += [
                Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)
            ]
        except OSError:
            continue  # a group that went, or that others must not look into
    return None
