"""Loads ``libkrasis_cpu`` and turns its status codes into errors. ``csrc/krasis.h`` describes the ABI itself.

The library is looked for in ``$KRASIS_LIB_DIR``, then in ``krasis/_lib`` of the installed distribution.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

import krasis
from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.process.control_groups import cpu_quota
from krasis.formats.process.machine_limits import address_space_hint, usable_cpus

ABI_VERSION = 4
LIBRARY_NAME = "libkrasis_cpu.so"

STATUS_OK = 0
STATUS_NONFINITE = 3
STATUS_SYSTEM = 7
_STATUS_TEXT = {
    1: "an argument is out of its domain",
    2: "a size is not a multiple of the layout's tile",
    3: "NaN or infinity among the weights",
    4: "this CPU lacks the instruction set asked for",
    5: "out of memory, or a workspace is too small",
    6: "a thread could not be started",
    7: "a system call failed",
    8: "an index is out of range",
    9: "something waited for did not come in time",
}

ISA_CODES = {"auto": 0, "avx2": 1, "avx512_vnni": 2, "amx_int8": 3}
ISA_NAMES = {code: name for name, code in ISA_CODES.items()}
DTYPE_CODES = {"F32": 0, "BF16": 1, "F16": 2}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None


def _candidates() -> Iterator[Path]:
    override = os.environ.get("KRASIS_LIB_DIR")
    if override:
        yield Path(override) / LIBRARY_NAME
        return
    # Beside the packages wherever they are (pip install --target), then where an editable install puts it.
    folders = [Path(one) for one in krasis.__path__]
    folders += [Path(sysconfig.get_path(key)) / "krasis" for key in ("platlib", "purelib")]
    for folder in dict.fromkeys(folders):
        yield folder / "_lib" / LIBRARY_NAME


def library_path() -> Path:
    """Where the native library lies. Raises NativeError if it was never built."""
    tried = list(_candidates())
    for path in tried:
        if path.is_file():
            return path
    raise NativeError(
        "the native library is not installed",
        where=LIBRARY_NAME,
        got="looked in " + ", ".join(str(path.parent) for path in tried),
        hint="install the package (pip install .), or set KRASIS_LIB_DIR to a CMake build folder",
    )


def library() -> ctypes.CDLL:
    """The loaded library (loaded once a process). errno is kept per call (``ctypes.get_errno``)."""
    global _library
    with _lock:
        if _library is None:
            path = library_path()
            try:
                loaded = ctypes.CDLL(str(path), use_errno=True)
            except OSError as error:
                raise NativeError(
                    "the native library cannot be loaded", where=str(path), got=error
                ) from error
            loaded.krasis_abi_version.restype = ctypes.c_int32
            version = loaded.krasis_abi_version()
            if version != ABI_VERSION:
                raise NativeError(
                    "the native library is of another version",
                    where=str(path),
                    got=f"ABI {version}",
                    limit=f"ABI {ABI_VERSION}",
                    hint="rebuild or reinstall the package",
                )
            _library = loaded
        return _library


def check(status: int, function: str) -> None:
    """Raises NativeError (ResourceError for memory, threads and system calls) unless status is 0."""
    if status == STATUS_OK:
        return
    text = _STATUS_TEXT.get(status, f"unknown status {status}")
    if status == STATUS_SYSTEM:
        code = ctypes.get_errno()
        hint = address_space_hint() if code == errno.ENOMEM else ""
        raise ResourceError(f"{text}: {os.strerror(code)}", where=function, hint=hint)
    if status in (5, 6):
        raise ResourceError(text, where=function, hint=address_space_hint())
    raise NativeError(text, where=function, got=f"status {status}")


def address(array: npt.NDArray[np.generic]) -> int:
    """The address of a C-contiguous array's first element. Raises NativeError for any other array."""
    if not array.flags.c_contiguous:
        raise NativeError(
            "array must be C-contiguous", got=f"strides {array.strides} for shape {array.shape}"
        )
    return int(array.ctypes.data)


class Pool:
    """A native thread pool with its instruction set. Used by one caller at a time; close it, or use ``with``.

    num_threads: threads including the caller; 0 = every CPU this process may run on, within the time that its
    control groups allow.
    isa: ``auto``, ``avx2``, ``avx512_vnni`` or ``amx_int8`` (AVX-512 VNNI, with AMX tiles for int8 products
    of many rows, which the operating system has to allow). All give the same bits. Raises NativeError if the
    CPU lacks it.
    """

    __slots__ = ("_handle", "_library", "_pid", "isa", "num_threads")

    def __init__(self, num_threads: int = 0, isa: str = "auto") -> None:
        self._handle: int | None = None
        self._pid = os.getpid()
        if isa not in ISA_CODES:
            raise NativeError("unknown instruction set", got=isa, limit=", ".join(ISA_CODES))
        self._library = library()
        create = self._library.krasis_pool_create
        create.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)]
        create.restype = ctypes.c_int32
        handle = ctypes.c_void_p()
        if not num_threads and cpu_quota() is not None:
            num_threads = usable_cpus()
        check(create(num_threads, ISA_CODES[isa], ctypes.byref(handle)), "krasis_pool_create")
        self._handle = handle.value
        self.num_threads = int(self._call("krasis_pool_num_threads"))
        has_amx = self._call("krasis_pool_has_amx")
        self.isa = "amx_int8" if has_amx else ISA_NAMES[int(self._call("krasis_pool_isa"))]

    def _call(self, name: str) -> int:
        function = getattr(self._library, name)
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_int32
        return int(function(self._handle))

    @property
    def handle(self) -> int:
        """The ``krasis_pool *`` as an integer. Raises NativeError after close."""
        if self._handle is None:
            raise NativeError("the thread pool is closed")
        return self._handle

    def set_spin(self, seconds: float) -> None:
        """How long idle threads look for work before they sleep: 40 microseconds at first, at most 1 s."""
        function = self._library.krasis_pool_set_spin
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        function.restype = ctypes.c_int32
        check(function(self.handle, int(seconds * 1e9)), "krasis_pool_set_spin")

    def close(self) -> None:
        """Stops the threads. Calling it again does nothing, nor does it in a child of ``fork``: the threads
        are the parent's."""
        handle, self._handle = self._handle, None
        if handle is not None and self._pid == os.getpid():
            destroy = self._library.krasis_pool_destroy
            destroy.argtypes = [ctypes.c_void_p]
            destroy.restype = None
            destroy(handle)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
