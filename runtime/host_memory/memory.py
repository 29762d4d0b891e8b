"""Host memory by the page: anonymous, or a file's, as tensors that keep it mapped."""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import ResourceError
from krasis.formats.limits import HUGE_PAGE_BYTES, PAGE_BYTES, align_up

Bytes = npt.NDArray[np.uint8]


def anonymous(num_bytes: int, *, huge_pages: bool = True, where: str = "host memory") -> Bytes:
    """Zeroed private memory of exactly that size, beginning at a multiple of 2 MiB; unmapped with the last
    view of it.

    No page exists before it is touched, and no node of a NUMA machine is preferred: pages come from the node
    of the thread that fills them. huge_pages: asks for transparent ones. Raises ResourceError.
    """
    length = align_up(num_bytes, PAGE_BYTES)
    try:
        # Two MiB more of addresses, never touched, so that huge pages begin where the experts begin.
        mapping = mmap.mmap(-1, length + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ResourceError(
            "memory cannot be mapped",
            where=where,
            got=error.strerror,
            limit=f"{length} bytes asked for",
            hint="look at ulimit -v and vm.overcommit_memory",
        ) from error
    advise(mapping, mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    whole = np.frombuffer(mapping, dtype=np.uint8)
    begin = -int(whole.ctypes.data) % HUGE_PAGE_BYTES
    return whole[begin : begin + num_bytes]


def advise(mapping: mmap.mmap, advice: int) -> bool:
    """Whether the kernel took the hint (those without huge pages refuse it)."""
    try:
        mapping.madvise(advice)
    except OSError:
        return False
    return True


def writable_file(fd: int, num_bytes: int, where: str) -> Bytes:
    """A shared mapping of a file that may be written, though nobody here does: drivers that cannot register
    memory for reading only ask for it. Raises ResourceError, also when the file may not be written.
    """
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ResourceError("file cannot be opened for writing", where=where, got=error.strerror) from error
    try:
        mapping = mmap.mmap(again, num_bytes, flags=mmap.MAP_SHARED)
    except (OSError, ValueError) as error:
        raise ResourceError("file cannot be mapped for writing", where=where, got=error) from error
    finally:
        os.close(again)
    return np.frombuffer(mapping, dtype=np.uint8)


class _Writable:
    """Describes read-only memory as writable: torch has no read-only tensors and warns of each."""

    def __init__(self, array: Bytes) -> None:
        self._kept = array
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": array.shape,
            "data": (int(array.ctypes.data), False),
        }


def tensor_of(array: Bytes) -> torch.Tensor:
    """The bytes as a tensor of the same shape, which keeps them mapped. Writing to mapped files' bytes is a
    fault.
    """
    if array.flags.writeable:
        return torch.from_numpy(array)
    flat = np.asarray(_Writable(array.reshape(-1)))
    return torch.from_numpy(flat).view(array.shape)
