"""What becomes of a program whose mapped file is cut short: one sentence and an exit code instead of SIGBUS.

No Python can run when that happens, so the native library speaks (``krasis_guard_install`` in csrc/krasis.h).
Only the command line programs install the guard: it sets a signal handler of the whole process and ends it,
which a library must not do behind the back of the program that it is part of. Such a program may call
``install`` itself; without it, nothing here does anything.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from krasis.formats.errors import FormatError, NativeError, ResourceError
from krasis.formats.native import check, library

_CUT = ": the file was cut short, removed or replaced while it was in use"
_UNREADABLE = ": the file cannot be read any more: its disk or file system reports an error"

_installed = False


def install(program: str, *, hint: str = "get this file again, then run the same command") -> None:
    """From now on a read of a mapped file that is not there any more ends the process.

    It writes one line to standard error, ``program: FILE: what happened. Hint: ...``, and exits with
    FormatError's code (the file was cut) or ResourceError's (its disk fails). The first call of a process
    counts. Raises NativeError if the native library is missing or too old.
    """
    global _installed
    native = library()
    if not hasattr(native, "krasis_guard_install"):
        raise NativeError(
            "the native library is of another version",
            got="it cannot guard mapped files",
            hint="rebuild or reinstall the package",
        )
    function = native.krasis_guard_install
    function.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_int32,
    ]
    function.restype = ctypes.c_int32
    check(
        function(
            f"{program}: ".encode(),
            f"{_CUT}. Hint: {hint}".encode(),
            FormatError.exit_code,
            f"{_UNREADABLE}. Hint: {hint}".encode(),
            ResourceError.exit_code,
        ),
        "krasis_guard_install",
    )
    _installed = True


def watch(address: int, num_bytes: int, fd: int, path: Path) -> bool:
    """Tells the guard which file lies there; False (and nothing to ``unwatch``) if no guard is installed."""
    if not _installed:
        return False
    add = library().krasis_guard_add
    add.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_char_p, ctypes.c_char_p]
    add.restype = ctypes.c_int32
    # Nothing in a name may drive the terminal, and no error class is there to see to it.
    name = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(path))
    check(add(address, num_bytes, fd, os.fsencode(path.absolute()), name.encode()), "krasis_guard_add")
    return True


def unwatch(address: int) -> None:
    """Must be called before a mapping that ``watch`` took is released."""
    remove = library().krasis_guard_remove
    remove.argtypes = [ctypes.c_void_p]
    remove.restype = ctypes.c_int32
    remove(address)
