"""A single file that appears under its name complete and durable, or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

from krasis.formats.files.file_ops import PARTIAL_SUFFIX, FileOps, io_errors, sync_directory, write_all

_log = logging.getLogger(__name__)
# What file systems without O_TMPFILE answer; kernels older than it see a directory opened for writing.
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS)


class AtomicFile:
    """Written at any offset inside ``with``; ``commit`` gives it its name, replacing a file that is there.

    Until then the file has no name at all, so that even a killed process leaves nothing behind; on file
    systems that cannot do that it is called ``X.partial`` meanwhile (one writer of X at a time). Every method
    raises ResourceError if the system refuses.
    """

    def __init__(self, path: str | os.PathLike[str], *, io: FileOps | None = None) -> None:
        self.path = Path(path).absolute()
        self._io = io or FileOps()
        self._fd = -1
        self._partial = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self._is_named = False

    def __enter__(self) -> AtomicFile:
        with io_errors("creating the file", self.path):
            try:
                self._fd = self._io.open_unnamed(self.path.parent)
            except OSError as error:
                if error.errno not in _NO_UNNAMED or not self.path.parent.is_dir():
                    raise
                _log.info("this file system has no unnamed files: %s is written first", self._partial)
                self._remove_partial()
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                self._fd = self._io.open(self._partial, flags)
                self._is_named = True
        return self

    def reserve(self, num_bytes: int) -> None:
        """Sets the size, so that a full disk is met now."""
        with io_errors(f"reserving {num_bytes} bytes", self.path):
            self._io.fallocate(self._fd, num_bytes)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Writes all of data at an offset."""
        with io_errors("writing", self.path):
            write_all(self._io, self._fd, data, offset)

    def commit(self) -> None:
        """Makes the contents durable and gives them their name."""
        with io_errors("writing to disk", self.path):
            self._io.fsync(self._fd)
        with io_errors("naming the file", self.path):
            if not self._is_named:
                self._name()
            if self._is_named:
                self._io.rename(self._partial, self.path)
                self._is_named = False
        sync_directory(self.path.parent, self._io)

    def _name(self) -> None:
        """The final name if it is free; otherwise the partial one, to be renamed over what is there."""
        try:
            self._io.link_unnamed(self._fd, self.path)
        except FileExistsError:
            self._remove_partial()
            self._io.link_unnamed(self._fd, self._partial)
            self._is_named = True

    def _remove_partial(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._io.unlink(self._partial)

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with io_errors("closing the file", self.path):
                self._io.close(fd)
        if self._is_named:
            self._is_named = False
            with io_errors("removing the unfinished file", self._partial):
                self._remove_partial()
