"""Reads ranges of a shard into memory, past the page cache where that is possible and sensible.

Reads that bypass the page cache leave it to the CPU experts and go at the disk's speed. What lies in the
cache already is copied from there: it is faster, and the disk is left alone. File systems that refuse direct
reads are read through the cache, and what was not in it before is dropped again.
"""

from __future__ import annotations

import errno
import logging
import os
from threading import Lock

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError, ResourceError
from krasis.runtime.host.filesystem import IN_RAM, filesystem_of
from krasis.runtime.host_memory import page_cache

Bytes = npt.NDArray[np.uint8]
logger = logging.getLogger(__name__)

WARM_SHARE = 0.9
"""A range with at least so much in the page cache is copied from there: reading the rest costs little."""

_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class ShardReader:
    """One shard. Used by several threads. ``close`` it when they are done.

    why_buffered: why nothing is read directly; empty while direct reads work. filesystem: it lies on.
    """

    def __init__(self, fd: int, where: str, *, direct: bool = True) -> None:
        """Takes over the descriptor. direct: whether to try direct reads at all."""
        self.where, self.why_buffered = where, ""
        self.direct_bytes = self.cached_bytes = 0
        self._fd, self._direct_fd = fd, -1
        self._lock = Lock()
        self.filesystem = filesystem_of(fd)
        self._sees_cache = page_cache.may_see(fd)
        if not direct:
            self.why_buffered = "not asked for"
        elif self.filesystem in IN_RAM:
            self.why_buffered = f"{self.filesystem} lies in memory"
        else:
            self._open_direct()

    def _open_direct(self) -> None:
        try:
            # The same file for certain, whatever its name leads to by now.
            path = f"/proc/self/fd/{self._fd}"
            self._direct_fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            self._give_up_direct(error.strerror or str(error))

    def _give_up_direct(self, why: str) -> None:
        with self._lock:
            first, self.why_buffered = not self.why_buffered, f"direct reads are refused: {why}"
        if first:
            logger.warning(
                "%s: %s (%s); reading through the page cache", self.where, self.why_buffered, self.filesystem
            )

    def read(self, offset: int, out: Bytes, mapped_address: int | None = None, *, keep: bool = False) -> None:
        """Fills out, uint8 [n] at a page boundary, with bytes from offset (a multiple of 4096).

        mapped_address: where the same bytes are mapped, to ask what is in the page cache. keep: read through
        the page cache and leave them there. Raises FormatError if the file ends before, ResourceError on I/O
        errors.
        """
        warm = self._is_warm(mapped_address, out.size)
        if not warm and not keep and not self.why_buffered:
            done = self._read_direct(offset, out)
            self._count(direct=done)
            if done == out.size:
                return
            offset, out = offset + done, out[done:]
        if not warm:
            self._advise(offset, out.size, os.POSIX_FADV_WILLNEED)
        self._read_all(offset, out)
        self._count(cached=out.size)
        if not warm and not keep:
            self._advise(offset, out.size, os.POSIX_FADV_DONTNEED)

    def _is_warm(self, address: int | None, num_bytes: int) -> bool:
        if self.filesystem in IN_RAM:
            return True
        if address is None or not self._sees_cache:
            return False
        return page_cache.cached_share(address, num_bytes) >= WARM_SHARE

    def _read_direct(self, offset: int, out: Bytes) -> int:
        """Bytes read, all of them unless direct reads turn out to be impossible."""
        done = 0
        while done < out.size:
            try:
                count = os.preadv(self._direct_fd, [out[done:].data], offset + done)
            except OSError as error:
                if error.errno in _REFUSALS:
                    self._give_up_direct(error.strerror or str(error))
                    return done
                raise self._failed(error, offset + done) from error
            if count == 0:
                raise self._too_short(offset + done, offset + out.size)
            if count % _BLOCK_BYTES:
                # Only the end of a file breaks a block: if it is not the end, the buffered path will say so.
                return done + count // _BLOCK_BYTES * _BLOCK_BYTES
            done += count
        return done

    def _read_all(self, offset: int, out: Bytes) -> None:
        done = 0
        while done < out.size:
            try:
                count = os.preadv(self._fd, [out[done:].data], offset + done)
            except OSError as error:
                raise self._failed(error, offset + done) from error
            if count == 0:
                raise self._too_short(offset + done, offset + out.size)
            done += count

    def prefetch(self, offset: int, num_bytes: int) -> None:
        """Asks the kernel to bring a range into the page cache; does not wait."""
        self._advise(offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def _advise(self, offset: int, num_bytes: int, advice: int) -> None:
        if num_bytes and self.filesystem not in IN_RAM:
            os.posix_fadvise(self._fd, offset, num_bytes, advice)

    def _count(self, direct: int = 0, cached: int = 0) -> None:
        with self._lock:
            self.direct_bytes += direct
            self.cached_bytes += cached

    def _failed(self, error: OSError, offset: int) -> ResourceError:
        return ResourceError(
            "reading experts failed", where=self.where, got=f"{error.strerror} at offset {offset}"
        )

    def _too_short(self, end: int, needed: int) -> FormatError:
        return FormatError(
            "file ends too early",
            where=self.where,
            got=f"{end} bytes",
            limit=f"{needed} needed",
            hint="it was cut short while the bundle was open",
        )

    def check_size(self, needed: int) -> None:
        """Raises FormatError if the file is shorter than ``needed`` bytes by now."""
        size = os.fstat(self._fd).st_size
        if size < needed:
            raise self._too_short(size, needed)

    def close(self) -> None:
        """Closes the descriptors. Calling it again does nothing."""
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1


_BLOCK_BYTES = 4096
