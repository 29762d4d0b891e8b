"""Every system call by which a bundle comes into being, in one class: tests replace it to fail or to die at
any call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from krasis.formats.errors import FormatError, ResourceError

_log = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".partial"  # of what is being written, until it has its name

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)

FILE_SIZE_HINT = (
    "files may not be so large here: use a smaller --shard-size, raise ulimit -f, or choose another disk"
)

_libc = ctypes.CDLL(None, use_errno=True)


class FileOps:
    """The calls that change the file system. All raise OSError; ``io_errors`` makes sentences of them."""

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o644) -> int:
        """open(2); the descriptor is close-on-exec."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def open_unnamed(self, directory: str | os.PathLike[str], mode: int = 0o644) -> int:
        """open(2) with O_TMPFILE, for writing: a file that is gone when its descriptor is, unless linked
        first.
        """
        return os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, mode)

    def link_unnamed(self, fd: int, target: str | os.PathLike[str]) -> None:
        """Gives a file of ``open_unnamed`` its name; FileExistsError if the name is taken."""
        # os.link follows /proc's link only when it is told a directory, and any will do for absolute names.
        root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(f"/proc/self/fd/{fd}", os.path.abspath(target), src_dir_fd=root)  # noqa: PTH100
        finally:
            os.close(root)

    def link(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        """link(2): another name for a file, which must not be taken."""
        os.link(source, target, follow_symlinks=False)

    def close(self, fd: int) -> None:
        """close(2)."""
        os.close(fd)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """mkdir(2)."""
        os.mkdir(path)  # noqa: PTH102 -- one system call a method

    def fallocate(self, fd: int, num_bytes: int) -> None:
        """Reserves the whole file, so that a full disk is met here. Where that is impossible: sets its size,
        and says so.
        """
        call = _libc.fallocate
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if call(fd, 0, 0, num_bytes) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
        _log.warning("this file system cannot reserve space: a full disk will be met only while writing")
        os.ftruncate(fd, num_bytes)

    def ftruncate(self, fd: int, num_bytes: int) -> None:
        """ftruncate(2)."""
        os.ftruncate(fd, num_bytes)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """pwrite(2): the number of bytes written, which may be fewer than given."""
        return os.pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        """fsync(2)."""
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        """fdatasync(2)."""
        os.fdatasync(fd)

    def rename(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        """rename(2): replaces a target that is there."""
        os.rename(source, target)  # noqa: PTH104 -- one system call a method

    def rename_noreplace(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        """renameat2(2) RENAME_NOREPLACE; FileExistsError if the target is there."""
        try:
            _renameat2(source, target, _RENAME_NOREPLACE)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            _log.info("this file system lacks RENAME_NOREPLACE: plain rename")
            os.rename(source, target)  # noqa: PTH104

    def rename_exchange(self, one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
        """Swaps two names atomically. False if the file system cannot."""
        try:
            _renameat2(one, other, _RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return False
        return True

    def unlink(self, path: str | os.PathLike[str]) -> None:
        """unlink(2)."""
        os.unlink(path)  # noqa: PTH108 -- one system call a method

    def rmdir(self, path: str | os.PathLike[str]) -> None:
        """rmdir(2)."""
        os.rmdir(path)  # noqa: PTH106 -- one system call a method


def _renameat2(source: str | os.PathLike[str], target: str | os.PathLike[str], flags: int) -> None:
    call = getattr(_libc, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))


def refusal(error: OSError) -> ResourceError:
    """An error of the system that nobody made a sentence of, as one."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    reason = error.strerror or str(error) or type(error).__name__
    return ResourceError(f"the system refused: {reason}", where=where, hint=way_out(error))


def way_out(error: OSError) -> str:
    """What a user can do about an error of the system; empty if nothing comes to mind."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some disk space or choose another output directory, then run the same command again"
    if error.errno == errno.EFBIG:
        return FILE_SIZE_HINT
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "allow more open files (ulimit -n)"
    return ""


@contextlib.contextmanager
def io_errors(what: str, where: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError inside the block into a ResourceError that says what was being done to which file; a
    FormatError where the bytes to be written lay in a mapped file that was cut short.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFAULT:  # the bytes come from a mapped file, whose end is not there any more
            raise FormatError(
                f"{what} failed: a file was cut short while it was read",
                where=str(where),
                hint="get the source again, then run the same command",
            ) from error
        reason = error.strerror or str(error)
        raise ResourceError(f"{what} failed: {reason}", where=str(where), hint=way_out(error)) from error


def sync_directory(path: Path, io: FileOps) -> None:
    """Makes the names in a directory durable. ResourceError if the system refuses."""
    with io_errors("syncing the directory", path):
        fd = io.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            io.fsync(fd)
        finally:
            io.close(fd)


def write_all(io: FileOps, fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of ``data`` at ``offset``. OSError, also when the system accepts nothing."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        count = io.pwrite(fd, view[done:], offset + done)
        if count <= 0:
            raise OSError(errno.EIO, "nothing was written")
        done += count
