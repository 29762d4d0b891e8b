"""Memory that begins at a page, as direct I/O wants it; large pieces at a huge page."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

from krasis.formats.limits import HUGE_PAGE_BYTES, PAGE_BYTES, align_up

Bytes = npt.NDArray[np.uint8]


def aligned_empty(num_bytes: int) -> Bytes:
    """uint8 [num_bytes], zero where untouched, given back to the system when its last view is gone.

    It begins at a multiple of 4 KiB; from 2 MiB on at one of 2 MiB, in huge pages where the system has them.
    """
    if num_bytes < HUGE_PAGE_BYTES:
        memory = _anonymous(max(num_bytes, 1))
        return np.frombuffer(memory, np.uint8)[:num_bytes]
    memory = _anonymous(align_up(num_bytes, HUGE_PAGE_BYTES) + HUGE_PAGE_BYTES)
    whole = np.frombuffer(memory, np.uint8)
    begin = -whole.ctypes.data % HUGE_PAGE_BYTES
    with contextlib.suppress(OSError):  # a kernel without huge pages refuses
        memory.madvise(mmap.MADV_HUGEPAGE, begin, align_up(num_bytes, HUGE_PAGE_BYTES))
    return whole[begin : begin + num_bytes]


def _anonymous(num_bytes: int) -> mmap.mmap:
    # Private: Linux does not give shared anonymous memory, Python's default, huge pages for the asking.
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def is_page_aligned(view: memoryview) -> bool:
    """Whether a buffer begins at a multiple of 4 KiB (an empty one does)."""
    if not view.nbytes:
        return True
    address: int = np.frombuffer(view, np.uint8).ctypes.data
    return address % PAGE_BYTES == 0
