"""One shard open for writing: whole 2 MiB pieces of the file go past the page cache, the rest through it.

A write through the page cache costs a copy, and pages that must be found first: on virtual machines that
alone can hold a conversion up. What is mixed in one file must never meet in one page. Here an aligned 2 MiB
piece of the file, which is also the largest unit of the page cache, is written either by direct writes or
through the cache; only a file system that refuses half-way changes that, and then the direct write is over.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Literal

from krasis.formats.errors import ResourceError
from krasis.formats.files.file_ops import FileOps, io_errors, write_all
from krasis.formats.limits import HUGE_PAGE_BYTES, MIB, PAGE_BYTES, align_up

OutputIo = Literal["auto", "direct", "buffered"]
OUTPUT_IO: tuple[OutputIo, ...] = ("auto", "direct", "buffered")

PIECE_BYTES = HUGE_PAGE_BYTES
_MAX_WRITE_BYTES = 64 * MIB
# How file systems without O_DIRECT answer, at open or at the first write.
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)

_log = logging.getLogger(__name__)


class DirectIo:
    """Whether a bundle's shards are written past the page cache: one decision for all of them.

    choice: ``auto`` takes the page cache where the file system refuses, ``direct`` fails there, ``buffered``
    does not try.
    """

    def __init__(self, choice: OutputIo) -> None:
        self._choice = choice
        self.refusal = "asked for" if choice == "buffered" else ""

    @property
    def is_on(self) -> bool:
        """False from the beginning, or from a refusal on."""
        return not self.refusal

    @property
    def description(self) -> str:
        """How shards are written, and why, for a person."""
        return "direct writes" if self.is_on else f"writes through the page cache ({self.refusal})"

    def refuse(self, path: Path, error: OSError) -> None:
        """The file system cannot. ResourceError if nothing else was wanted."""
        reason = error.strerror or str(error)
        if self._choice == "direct":
            raise ResourceError(
                "this file system takes no direct writes",
                where=str(path),
                got=reason,
                hint="--output-io auto writes through the page cache instead",
            ) from error
        if self.is_on:
            self.refusal = f"the file system takes no direct writes: {reason}"
            _log.info("%s: %s", path, self.description)


class ShardOutput:
    """A shard's descriptors. ``put`` may be called by several threads for different blobs."""

    def __init__(self, path: Path, fd: int, io: FileOps, direct: DirectIo) -> None:
        """Takes ``fd`` over. ``open_direct`` before the first ``put``, or nothing is written directly."""
        self.path, self.fd = path, fd
        self._io, self._direct = io, direct
        self._direct_fd = -1

    @property
    def is_direct(self) -> bool:
        """Whether whole pieces go past the page cache now; they must then begin at pages of memory."""
        return self._direct_fd >= 0 and self._direct.is_on

    def open_direct(self) -> None:
        """Opens the file a second time for direct writes, if they are wanted.

        ResourceError if the system refuses for another reason than that it cannot.
        """
        if not self._direct.is_on:
            return
        with io_errors("opening a shard", self.path):
            try:
                self._direct_fd = self._io.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._direct.refuse(self.path, error)

    def put(self, view: memoryview, offset: int) -> None:
        """Writes all of a buffer of bytes. OSError; ResourceError as ``DirectIo.refuse``."""
        first = align_up(offset, PIECE_BYTES)
        last = (offset + len(view)) // PIECE_BYTES * PIECE_BYTES
        if self.is_direct and first < last:
            self._put_buffered(view[: first - offset], offset)
            done = self._put_direct(view[first - offset : last - offset], first)
            view, offset = view[first + done - offset :], first + done
        self._put_buffered(view, offset)

    def _put_buffered(self, view: memoryview, offset: int) -> None:
        for begin in range(0, len(view), _MAX_WRITE_BYTES):
            write_all(self._io, self.fd, view[begin : begin + _MAX_WRITE_BYTES], offset + begin)

    def _put_direct(self, view: memoryview, offset: int) -> int:
        """Bytes written: all, or whole pages of them when the file system does not take the rest directly."""
        done = 0
        while done < len(view):
            try:
                count = self._io.pwrite(self._direct_fd, view[done : done + _MAX_WRITE_BYTES], offset + done)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._direct.refuse(self.path, error)
                return done
            # A write that was cut short inside a page is repeated from the page's beginning.
            whole = count // PAGE_BYTES * PAGE_BYTES
            if whole <= 0:
                return done
            done += whole
        return done

    def close(self) -> None:
        """Closes both descriptors, once. ResourceError if the system refuses."""
        fds, self.fd, self._direct_fd = (self._direct_fd, self.fd), -1, -1
        with io_errors("closing a shard", self.path):
            try:
                if fds[0] >= 0:
                    self._io.close(fds[0])
            finally:
                if fds[1] >= 0:
                    self._io.close(fds[1])
