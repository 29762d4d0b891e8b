"""Shards mapped by the native library at addresses that are multiples of 2 MiB, so that huge pages can back
them.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import ResourceError
from krasis.formats.files import mapping_guard
from krasis.formats.limits import HUGE_PAGE_BYTES, PAGE_BYTES
from krasis.formats.native import STATUS_SYSTEM, check, library


class FileMapping:
    """A read-only mapping of a whole file; unmapped when the last view of it is gone.

    The object describes itself to NumPy, so that every array made of it keeps it alive: no view can outlive
    the mapping.
    """

    __slots__ = ("_is_watched", "_unmap", "address", "num_bytes")

    def __init__(self, fd: int, num_bytes: int, path: Path | None = None) -> None:
        """Maps ``num_bytes`` (> 0), the file's size; the descriptor may be closed afterwards. ResourceError
        if refused. path: what a guard of mapped files shall call it.
        """
        native = library()
        self._is_watched = False
        self.address = 0
        self.num_bytes = num_bytes
        map_file = native.krasis_map_file
        map_file.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)]
        map_file.restype = ctypes.c_int32
        self._unmap = native.krasis_unmap_file
        self._unmap.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._unmap.restype = ctypes.c_int32
        address = ctypes.c_void_p()
        check(map_file(fd, num_bytes, HUGE_PAGE_BYTES, ctypes.byref(address)), "krasis_map_file")
        self.address = int(address.value or 0)
        if path is not None:
            self._is_watched = mapping_guard.watch(self.address, num_bytes, fd, path)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "shape": (self.num_bytes,), "data": (self.address, True)}

    def view(self) -> npt.NDArray[np.uint8]:
        """uint8 [num_bytes], read-only."""
        return np.asarray(self)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            if self._is_watched:
                mapping_guard.unwatch(self.address)
            self._unmap(self.address, self.num_bytes)
            self.address = 0


def prefault(address: int, num_bytes: int) -> None:
    """Brings a mapped range into memory; blocks, without the interpreter's lock. ResourceError if it cannot
    be read: its file was cut short, or its disk fails.
    """
    function = library().krasis_prefault
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    function.restype = ctypes.c_int32
    status = function(address, num_bytes)
    if status == STATUS_SYSTEM and ctypes.get_errno() == errno.EFAULT:  # what a read would be SIGBUS for
        raise ResourceError("a mapped file was cut short, or its disk does not give it")
    check(status, "krasis_prefault")


def advise(address: int, num_bytes: int, advice: int) -> None:
    """Tells the kernel how a mapped range will be used (``mmap.MADV_...``): whole pages around it. What it
    makes of that is its own matter, so nothing is raised.
    """
    begin = address - address % PAGE_BYTES
    _madvise()(begin, address + num_bytes - begin, advice)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
