"""The mounts of this process, from /proc/self/mountinfo: which file system lies where, which part of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount. root: the folder of the file system that is mounted; point: where; kind: ``ext4``,
    ``cgroup2``. options: of the file system itself (for cgroup version 1 its controllers).
    """

    root: str
    point: str
    kind: str
    options: tuple[str, ...]


def mounts(root: Path = Path("/")) -> list[Mount]:
    """All mounts, later ones over earlier ones; empty where the kernel does not say. root: stands for the
    file system's root, so that tests can show another machine's files.
    """
    found = (_mount(line) for line in read_text(root / "proc/self/mountinfo").splitlines())
    return [mount for mount in found if mount is not None]


def filesystem_kind(path: Path, root: Path = Path("/")) -> str:
    """The kind of file system that an existing path lies on, such as ``vfat``; empty if it is not known."""
    parts = Path(os.path.realpath(path)).parts
    best, kind = 0, ""
    for mount in mounts(root):
        point = Path(mount.point).parts
        if len(point) >= best and parts[: len(point)] == point:
            best, kind = len(point), mount.kind
    return kind


def read_text(path: Path) -> str:
    """A small text file of the kernel; empty if it is not there."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _mount(line: str) -> Mount | None:
    # 36 35 98:0 /root /point rw,noatime shared:1 ... - kind device options
    fields = line.split(" ")
    if "-" not in fields[6:]:
        return None
    end = fields.index("-", 6)
    if len(fields) < end + 4:
        return None
    root, point = (_ESCAPE.sub(lambda match: chr(int(match.group(1), 8)), text) for text in fields[3:5])
    return Mount(root, point, fields[end + 1], tuple(fields[end + 3].split(",")))
