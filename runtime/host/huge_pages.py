"""Whether mapped weights lie in huge pages, and moving them there.

The page cache keeps a file in pages as large as it came in by: what Krasis wrote or read is huge, what ``cp``
or a download left in memory is not, and the kernels read it slower. MADV_COLLAPSE copies small pages together
where the kernel has it for the file: on tmpfs, with CONFIG_READ_ONLY_THP_FOR_FS, on Linux 7.2 and later.
Elsewhere the file can be dropped from the page cache and read anew (``Bundle.drop_cached``).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from krasis.formats.limits import MIB
from krasis.formats.native import check
from krasis.runtime.cpu.native import prototype

logger = logging.getLogger(__name__)

Range = tuple[int, int]  # address, bytes

# Each call first makes every CPU give up its lists of pages, which takes milliseconds: most of the time if a
# call moves 2 MiB. Longer pieces would make stopping slower.
PIECE_BYTES = 64 * MIB


def huge_and_mapped_bytes(ranges: Sequence[Range]) -> tuple[int, int]:
    """(bytes mapped by huge pages, all bytes mapped) of this process's page tables for the ranges.

    Counted by whole mappings of the kernel that a range touches. Zeros if it does not say.
    """
    huge = mapped = 0
    inside = False
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        name, _, value = line.partition(" ")
        if "-" in name:
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = any(begin < address + num_bytes and address < end for address, num_bytes in ranges)
        elif inside and name == "Rss:":
            mapped += int(value.split()[0]) * 1024
        elif inside and name in ("FilePmdMapped:", "ShmemPmdMapped:"):
            huge += int(value.split()[0]) * 1024
    return huge, mapped


def huge_share(ranges: Sequence[Range]) -> float | None:
    """The share of what is mapped of the ranges that huge pages map, 0 to 1; None if nothing is."""
    huge, mapped = huge_and_mapped_bytes(ranges)
    return huge / mapped if mapped else None


def collapse(address: int, num_bytes: int) -> int:
    """Moves the whole 2 MiB pieces of a range of mapped memory into huge pages; blocks.

    Gives 0, or the errno with which the kernel declined: EINVAL if it does that for no such file. Raises
    NativeError for an empty range.
    """
    declined = ctypes.c_int32()
    check(prototype("krasis_collapse")(address, num_bytes, ctypes.byref(declined)), "krasis_collapse")
    return declined.value


def collapse_all(ranges: Sequence[Range], num_threads: int, stopping: threading.Event) -> None:
    """``collapse`` for all ranges by several threads, piece by piece, until done or told to stop."""

    def work(piece: Range) -> int:
        return 0 if stopping.is_set() else collapse(*piece)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="krasis-collapse") as pool:
        declined = set(pool.map(work, _pieces(ranges))) - {0}
    if declined:
        reasons = ", ".join(sorted(os.strerror(code) for code in declined))
        logger.info("moving weights into huge pages was declined: %s", reasons)


def _pieces(ranges: Sequence[Range]) -> Iterator[Range]:
    for address, num_bytes in ranges:
        for offset in range(0, num_bytes, PIECE_BYTES):
            yield address + offset, min(PIECE_BYTES, num_bytes - offset)
