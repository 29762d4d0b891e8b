"""The memory that control groups leave to this process, version 1 or 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED_BYTES = 2**60


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """A group with a limit. available_bytes: what of it is not in use but by the page cache."""

    limit_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class _Names:
    """What one version calls its files and figures."""

    base: str
    limit: str
    usage: str
    cache: tuple[str, ...]


_VERSION_2 = _Names("sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file"))
_VERSION_1 = _Names(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)


def limited_groups(root: Path = Path("/")) -> list[GroupMemory]:
    """This process's group and its parents, those that have a limit."""
    return [group for names, folder in _folders(root) if (group := _group(names, folder)) is not None]


def _folders(root: Path) -> Iterator[tuple[_Names, Path]]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if controllers == "":
            names = _VERSION_2
        elif "memory" in controllers.split(","):
            names = _VERSION_1
        else:
            continue
        folders = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(len(folders), -1, -1):
            yield names, (root / names.base).joinpath(*folders[:depth])


def _group(names: _Names, folder: Path) -> GroupMemory | None:
    limit = _read(folder / names.limit).strip()
    if not limit.isdecimal() or int(limit) >= _UNLIMITED_BYTES:
        return None
    usage = _read(folder / names.usage).strip()
    used = int(usage) if usage.isdecimal() else 0
    stat = _read(folder / "memory.stat")
    found = (re.search(rf"^{name} (\d+)$", stat, re.MULTILINE) for name in names.cache)
    cache = sum(int(match.group(1)) for match in found if match)
    return GroupMemory(int(limit), max(0, int(limit) - max(0, used - cache)))


def _read(path: Path) -> str:
    """A small text file of the kernel; empty if it is not there."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
