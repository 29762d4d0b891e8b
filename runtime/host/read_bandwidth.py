"""The read bandwidth of RAM at full speed, measured in about half a second."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

from krasis.formats import native
from krasis.formats.errors import KrasisError
from krasis.formats.files.aligned import aligned_empty
from krasis.runtime.planning.hardware import Figure

_MIB = 2**20
_CHUNK_BYTES = 8 * _MIB
_LEAST_BUFFER_BYTES = 256 * _MIB
_MOST_BUFFER_BYTES = 1024 * _MIB
_TOUCH_BUDGET_S = 0.25
_READ_BUDGET_S = 0.2
_MAX_REPEATS = 8


def measure_read_bandwidth(l3_bytes: int, available_bytes: int, notes: list[str]) -> Figure | None:
    """Reads a buffer larger than the L3 cache with every thread, in about half a second.

    None (with the reason in ``notes``) if the native library cannot.
    """
    most_bytes = min(max(_LEAST_BUFFER_BYTES, 4 * l3_bytes), _MOST_BUFFER_BYTES)
    most_bytes = max(min(most_bytes, available_bytes // 8), _CHUNK_BYTES)
    try:
        rate, num_bytes = _best_rate(most_bytes - most_bytes % _CHUNK_BYTES)
    except KrasisError as error:
        notes.append(f"RAM bandwidth is not measured: {error}")
        return None
    except AttributeError:
        notes.append("RAM bandwidth is not measured: the native library lacks krasis_read_bandwidth")
        return None
    if num_bytes < 2 * l3_bytes:
        notes.append(f"RAM bandwidth may include the L3 cache: only {num_bytes // _MIB} MiB were read")
    return Figure(rate / 1e9, "measured", f"best of reads of {num_bytes // _MIB} MiB by all threads")


def _best_rate(most_bytes: int) -> tuple[float, int]:
    """(bytes/s of the fastest pass, bytes read in one). Raises NativeError or ResourceError."""
    read = native.library().krasis_read_bandwidth
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_double)]
    read.restype = ctypes.c_int32
    seconds = ctypes.c_double()
    best = 0.0
    buffer = aligned_empty(most_bytes)  # huge pages where decode gets them too
    address = buffer.ctypes.data
    with native.Pool() as pool:
        num_bytes = _touch(address, most_bytes, pool.num_threads)
        start = time.monotonic()
        for _ in range(_MAX_REPEATS):
            status = read(pool.handle, address, num_bytes, ctypes.byref(seconds))
            native.check(status, "krasis_read_bandwidth")
            best = max(best, num_bytes / max(seconds.value, 1e-9))
            if time.monotonic() - start > _READ_BUDGET_S:
                break
    return best, num_bytes


def _touch(address: int, most_bytes: int, num_threads: int) -> int:
    """Writes to the buffer until the time is up; bytes written. (Unwritten pages are all one zero page.)"""
    deadline = time.monotonic() + _TOUCH_BUDGET_S
    num_bytes = 0
    with ThreadPoolExecutor(num_threads) as threads:
        while num_bytes < most_bytes and (num_bytes == 0 or time.monotonic() < deadline):
            round_bytes = min(num_threads * _CHUNK_BYTES, most_bytes - num_bytes)
            chunks = range(address + num_bytes, address + num_bytes + round_bytes, _CHUNK_BYTES)
            list(threads.map(_fill, chunks))  # ctypes lets go of the interpreter's lock
            num_bytes += round_bytes
    return num_bytes


def _fill(address: int) -> None:
    ctypes.memset(address, 1, _CHUNK_BYTES)
