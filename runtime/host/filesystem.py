"""Which file system a file lies on: some live in RAM, and their pages can be pinned where they are."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

from krasis.formats.errors import ResourceError

if TYPE_CHECKING:
    from krasis.formats.bundle.reader import Bundle

# f_type of statfs(2), as the kernel's magic.h has them.
_NAMES = {
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x958458F6: "hugetlbfs",
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
    0x794C7630: "overlayfs",
    0x6969: "nfs",
    0x01021997: "9p",
    0x65735546: "fuse",
    0xCA451A4E: "bcachefs",
}
IN_RAM = frozenset({"tmpfs", "ramfs", "hugetlbfs"})


def filesystem_of(fd: int) -> str:
    """``ext4``, ``tmpfs``, ... or the magic number in hex. Raises ResourceError."""
    buffer = ctypes.create_string_buffer(512)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fstatfs(fd, buffer) != 0:
        raise ResourceError("fstatfs failed", got=os.strerror(ctypes.get_errno()))
    # f_type is the first long of the structure on 64-bit machines.
    magic = int.from_bytes(buffer.raw[:8], "little") & 0xFFFFFFFF
    return _NAMES.get(magic, hex(magic))


def filesystem_of_path(path: Path) -> str:
    """The same for a path. Raises ResourceError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ResourceError("cannot be opened", where=str(path), got=error.strerror) from error
    try:
        return filesystem_of(fd)
    finally:
        os.close(fd)


def weights_to_hold_bytes(bundle: Bundle, tiers: tuple[str, ...]) -> int:
    """Weights of those tiers that have yet to find room in RAM: none where the bundle itself lies in RAM."""
    if filesystem_of_path(bundle.path) in IN_RAM:
        return 0
    return sum(blob.num_bytes for blob in bundle.manifest.blobs if blob.tier in tiers)
