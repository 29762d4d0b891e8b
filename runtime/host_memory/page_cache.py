"""How much of a mapped file lies in the page cache."""

from __future__ import annotations

import ctypes
import os

import numpy as np

from krasis.formats.limits import PAGE_BYTES


def may_see(fd: int) -> bool:
    """Whether the kernel tells this process the truth about a file's pages: only its owner, and who may write
    it.
    """
    owner = os.fstat(fd).st_uid
    return os.geteuid() in (0, owner) or os.access(f"/proc/self/fd/{fd}", os.W_OK)


def cached_share(address: int, num_bytes: int) -> float:
    """The share of a mapped range's pages that are in memory, 0 to 1; 0 if the kernel does not say."""
    begin = address // PAGE_BYTES * PAGE_BYTES
    num_pages = -(-(address + num_bytes - begin) // PAGE_BYTES)
    present = np.zeros(max(num_pages, 1), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    status = libc.mincore(
        ctypes.c_void_p(begin), ctypes.c_size_t(num_pages * PAGE_BYTES), ctypes.c_void_p(present.ctypes.data)
    )
    return float((present & 1).mean()) if status == 0 else 0.0
