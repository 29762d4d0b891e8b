"""Shards mapped by the native library at addresses that are multiples of 2 MiB, so that huge pages can back
them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.limits import HUGE_PAGE_BYTES
from krasis.formats.native import check, library


class FileMapping:
    """A read-only mapping of a whole file; unmapped when the last view of it is gone.

    The object describes itself to NumPy, so that every array made of it keeps it alive: no view can outlive
    the mapping.
    """

    __slots__ = ("_unmap", "address", "num_bytes")

    def __init__(self, fd: int, num_bytes: int) -> None:
        """Maps ``num_bytes`` (> 0), the file's size; the descriptor may be closed afterwards. ResourceError
        if refused.
        """
        native = library()
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

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "shape": (self.num_bytes,), "data": (self.address, True)}

    def view(self) -> npt.NDArray[np.uint8]:
        """uint8 [num_bytes], read-only."""
        return np.asarray(self)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._unmap(self.address, self.num_bytes)
            self.address = 0


def prefault(address: int, num_bytes: int) -> None:
    """Brings a mapped range into memory; blocks, without the interpreter's lock. ResourceError if it cannot
    be read.
    """
    function = library().krasis_prefault
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    function.restype = ctypes.c_int32
    check(function(address, num_bytes), "krasis_prefault")
