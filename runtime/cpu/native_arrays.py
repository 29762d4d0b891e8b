"""Arrays as native code wants them: checked shape, dtype and contiguity, with an address looked up once.

NumPy takes most of a microsecond to tell an array's address, as long as a whole native call; addresses are
therefore kept for as long as the array lives.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError

Array = npt.NDArray[Any]

F32 = np.dtype(np.float32)
F16 = np.dtype(np.float16)
I8 = np.dtype(np.int8)
U8 = np.dtype(np.uint8)
U16 = np.dtype(np.uint16)
I32 = np.dtype(np.int32)

_known: dict[int, tuple[weakref.ref[Array], int, bool]] = {}


def pointer(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> int:
    """The address of a C-contiguous array that native code reads. Raises NativeError for any other array."""
    if array.shape != shape or (array.dtype is not dtype and array.dtype != dtype):
        raise _mismatch(array, shape, dtype, name)
    known = _known.get(id(array))
    if known is not None and known[0]() is array:
        return known[1]
    return _learn(array, name)[1]


def out_pointer(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> int:
    """As ``pointer`` for an array that native code writes: it must be writable too."""
    if array.shape != shape or (array.dtype is not dtype and array.dtype != dtype):
        raise _mismatch(array, shape, dtype, name)
    known = _known.get(id(array))
    if known is None or known[0]() is not array:
        known = _learn(array, name)
    if not known[2]:
        raise NativeError("array is read-only", where=name)
    return known[1]


def shape_2d(array: Array, name: str) -> tuple[int, int]:
    """The shape of a matrix. Raises NativeError for another rank."""
    shape = array.shape
    if len(shape) != 2:
        raise NativeError("array must have two dimensions", where=name, got=f"shape {shape}")
    return shape


def _mismatch(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> NativeError:
    return NativeError(
        "array has the wrong shape or type",
        where=name,
        got=f"{array.dtype} {list(array.shape)}",
        limit=f"{dtype} {list(shape)}",
    )


def _learn(array: Array, name: str) -> tuple[weakref.ref[Array], int, bool]:
    if not array.flags.c_contiguous:
        raise NativeError("array must be C-contiguous", where=name, got=f"strides {array.strides}")
    key = id(array)

    def forget(_: object, key: int = key) -> None:
        _known.pop(key, None)

    entry = (weakref.ref(array, forget), int(array.ctypes.data), bool(array.flags.writeable))
    _known[key] = entry
    return entry


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike, alignment_bytes: int = 64) -> Array:
    """An uninitialised C-contiguous array whose first element lies at a multiple of alignment_bytes."""
    kind = np.dtype(dtype)
    num_bytes = math.prod(shape) * kind.itemsize
    raw = np.empty(num_bytes + alignment_bytes, dtype=np.uint8)
    skip = -int(raw.ctypes.data) % alignment_bytes
    return raw[skip : skip + num_bytes].view(kind).reshape(shape)
