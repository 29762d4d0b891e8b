"""Opening and reading files that may not be what they seem: only regular files, never blocking, never a
device.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError, ResourceError
from krasis.formats.files import mapping_guard
from krasis.formats.files.file_ops import way_out
from krasis.formats.process.machine_limits import address_space_hint

Bytes = npt.NDArray[np.uint8]

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path, *, follow_links: bool, dir_fd: int | None = None) -> int:
    """A read-only descriptor of a regular file.

    follow_links: sources may be links (the Hugging Face cache is made of them) if they lead to a regular
    file; files of a bundle may not. dir_fd: the directory that ``path.name`` is looked up in instead of
    following ``path``. Raises FormatError if it is missing or not a regular file, ResourceError if the system
    refuses.
    """
    target: str | Path = path if dir_fd is None else path.name
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow_links else os.O_NOFOLLOW)
    try:
        # Looked at before it is opened, because opening a device can act on it; and again after, because it
        # may have been exchanged in between.
        _check_kind(os.stat(target, dir_fd=dir_fd, follow_symlinks=follow_links), path)
        fd = os.open(target, flags, dir_fd=dir_fd)
    except OSError as error:
        raise _open_error(error, path) from error
    try:
        _check_kind(os.fstat(fd), path)
    except FormatError:
        os.close(fd)
        raise
    return fd


def _check_kind(status: os.stat_result, path: Path) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "of an unknown kind")
    raise FormatError("not a regular file", where=str(path), got=kind, hint="replace it by the file itself")


def _open_error(error: OSError, path: Path) -> FormatError | ResourceError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if path.is_symlink():
            return FormatError(
                "the link leads nowhere",
                where=str(path),
                hint="copy it with what it points to (cp -L), or download it again",
            )
        return FormatError(
            "file is missing", where=str(path), hint="check the path; a download may be incomplete"
        )
    if error.errno == errno.ELOOP:
        return FormatError(
            "not a regular file", where=str(path), got="a symbolic link", hint="replace it by the file"
        )
    return ResourceError("file cannot be opened", where=str(path), got=error.strerror, hint=way_out(error))


def list_names(directory: Path) -> list[str]:
    """Names of a directory's entries, sorted. ResourceError if the system refuses."""
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise ResourceError("directory cannot be read", where=str(directory), got=error.strerror) from error


def read_range(fd: int, offset: int, num_bytes: int, where: str) -> bytes:
    """Exactly ``num_bytes`` bytes from ``offset``. FormatError if the file ends before, ResourceError on I/O
    errors.
    """
    parts = []
    done = 0
    while done < num_bytes:
        try:
            part = os.pread(fd, num_bytes - done, offset + done)
        except OSError as error:
            raise ResourceError("reading failed", where=where, got=error.strerror) from error
        if not part:
            raise FormatError(
                "file ends too early",
                where=where,
                got=f"{offset + done} bytes",
                limit=f"{offset + num_bytes} needed",
                hint="the download may be incomplete",
            )
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_into(fd: int, offset: int, out: Bytes, where: str) -> None:
    """Fills a contiguous uint8 array from ``offset``. Errors as ``read_range``."""
    view = memoryview(out)  # type: ignore[arg-type]  # NumPy's stubs hide that arrays are buffers
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise ResourceError("reading failed", where=where, got=error.strerror) from error
        if not count:
            raise FormatError(
                "file ends too early",
                where=where,
                got=f"{offset + done} bytes",
                limit=f"{offset + len(view)} needed",
                hint="the download may be incomplete",
            )
        done += count


def read_small_file(path: Path, max_bytes: int, *, follow_links: bool, dir_fd: int | None = None) -> bytes:
    """The whole of a regular file of at most ``max_bytes``. Errors as ``open_regular``; FormatError if it is
    larger.
    """
    fd = open_regular(path, follow_links=follow_links, dir_fd=dir_fd)
    try:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise FormatError(
                "file is too large", where=str(path), got=f"{size} bytes", limit=f"{max_bytes} bytes"
            )
        return read_range(fd, 0, size, str(path)) if size else b""
    finally:
        os.close(fd)


class MappedFile:
    """A read-only shared mapping of a source file, as bytes. Views of it keep it alive.

    Another process that truncates the file while it is mapped ends this one: with SIGBUS, or as
    ``mapping_guard`` says it.
    """

    __slots__ = ("_mmap", "bytes", "path")

    def __init__(self, fd: int, num_bytes: int, path: Path) -> None:
        """Maps ``num_bytes`` (> 0) of the file; the descriptor can be closed afterwards."""
        self.path = path
        try:
            self._mmap = mmap.mmap(fd, num_bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:
            hint = address_space_hint()
            raise ResourceError(
                "file cannot be mapped into memory", where=str(path), got=error, hint=hint
            ) from error
        # [num_bytes] uint8, read-only
        self.bytes: Bytes = np.frombuffer(self._mmap, dtype=np.uint8)
        address = self.bytes.ctypes.data
        if mapping_guard.watch(address, num_bytes, fd, path):
            weakref.finalize(self._mmap, mapping_guard.unwatch, address).atexit = False

    def release(self, offset: int, num_bytes: int) -> None:
        """Gives the pages wholly inside the range back; they are read again if touched again."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._mmap.madvise(mmap.MADV_DONTNEED, start, end - start)
