"""Finds and loads libkrasis_cuda, or its double: the same functions compiled as host code, for tests.

Nothing is loaded before it is asked for. libkrasis_cuda is looked for in ``$KRASIS_CUDA_LIB`` (a file), then
beside libkrasis_cpu; the double in ``$KRASIS_CUDA_DOUBLE`` (a file), then in a source tree's build folders.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.native import check, library_path

ABI_VERSION = 6
CUDA_NAME = "libkrasis_cuda.so"
DOUBLE_NAME = "libkrasis_cuda_double.so"
STATUS_CUDA = 100

_log = logging.getLogger(__name__)


def cuda_candidates() -> list[Path]:
    """Where libkrasis_cuda may lie, in the order of looking."""
    named = os.environ.get("KRASIS_CUDA_LIB")
    if named:
        return [Path(named)]
    folder = library_path().parent  # of an installation, or the csrc folder of a CMake build
    return [folder / CUDA_NAME, folder / "cuda" / CUDA_NAME]


def double_candidates() -> list[Path]:
    """Where the double may lie, in the order of looking."""
    named = os.environ.get("KRASIS_CUDA_DOUBLE")
    if named:
        return [Path(named)]
    built = Path("csrc", "cuda", "tests", DOUBLE_NAME)
    beside = library_path().parent / "cuda" / "tests" / DOUBLE_NAME
    source_tree = Path(__file__).resolve().parents[2]
    return [beside, source_tree / "build" / "cuda" / built, source_tree / "build" / "double" / built]


def find_cuda_library() -> Path:
    """Where libkrasis_cuda is. Raises NativeError if this build lacks it; nothing is loaded."""
    hint = "build it with a CUDA compiler (KRASIS_CUDA=on pip install .), or set KRASIS_CUDA_LIB to its file"
    return _find(cuda_candidates(), CUDA_NAME, hint)


@functools.cache
def cuda_library() -> ctypes.CDLL:
    """libkrasis_cuda. Raises NativeError if it is missing, cannot be loaded or has another ABI."""
    return _load(find_cuda_library())


@functools.cache
def double_library() -> ctypes.CDLL:
    """The double of libkrasis_cuda. Raises NativeError as ``cuda_library`` does."""
    hint = (
        "build the CMake target krasis_cuda_double (-DKRASIS_NATIVE_TESTS=ON), set KRASIS_CUDA_DOUBLE to it"
    )
    return _load(_find(double_candidates(), DOUBLE_NAME, hint))


def _find(candidates: Sequence[Path], name: str, hint: str) -> Path:
    for path in candidates:
        if path.is_file():
            return path
    looked_in = "looked for " + ", ".join(str(path) for path in candidates)
    raise NativeError("the native GPU library is not there", where=name, got=looked_in, hint=hint)


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path), use_errno=True)
        version_function, error_function = library.krasis_cuda_abi_version, library.krasis_cuda_last_error
    except (OSError, AttributeError) as error:
        raise NativeError("the native GPU library cannot be loaded", where=str(path), got=error) from error
    version_function.restype = ctypes.c_int32
    error_function.restype = ctypes.c_char_p
    version = version_function()
    if version != ABI_VERSION:
        raise NativeError(
            "the native GPU library is of another version",
            where=str(path),
            got=f"ABI {version}",
            limit=f"ABI {ABI_VERSION}",
            hint="rebuild or reinstall the package",
        )
    _log.info("loaded %s", path)
    return library


def last_error(library: ctypes.CDLL) -> str:
    """CUDA's words for the last failed call of this thread; empty if there was none."""
    return bytes(library.krasis_cuda_last_error()).decode(errors="replace")


def check_status(library: ctypes.CDLL, status: int, function: str) -> None:
    """Raises NativeError (ResourceError for memory and the system) unless status is 0."""
    if status == STATUS_CUDA:
        raise ResourceError(f"CUDA failed: {last_error(library) or 'no words'}", where=function)
    check(status, function)
