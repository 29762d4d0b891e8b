"""ctypes wrappers of the packing functions of ``csrc/krasis.h``: shapes are checked, codes become errors."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError, NativeError
from krasis.formats.layouts import mxfp4
from krasis.formats.layouts.given_steps import STEP_K, given_steps
from krasis.formats.layouts.matrix import MatrixView, PackStats
from krasis.formats.native import DTYPE_CODES, STATUS_NONFINITE, Pool, check, library

TILE_CODES = {"q8": 0, "i4": 1, "mxfp4": 2}

_F16_LARGEST = 65504.0
_I32, _I64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Stats(ctypes.Structure):
    _fields_ = (
        ("squared_error", ctypes.c_double),
        ("squared_sum", ctypes.c_double),
        ("max_abs_error", ctypes.c_double),
        ("count", ctypes.c_int64),
        ("nonfinite_row", ctypes.c_int64),
    )


# The matrix (src, dtype, n, k, row_stride) and what follows it; the pool comes first and the statistics last.
_MATRIX = (_PTR, _I32, _I64, _I64, _I64)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "krasis_pack_marlin": (*_MATRIX, _I32, _I64, _I64, _I64, _PTR, _PTR, _PTR, _I32),
    "krasis_pack_marlin_steps": (*_MATRIX, _I64, _I64, _I64, _PTR, _PTR, _PTR, _I32),
    "krasis_pack_cpu_tiles": (_I32, *_MATRIX, _I64, _I64, _PTR, _PTR),
    "krasis_pack_cpu_tiles_steps": (*_MATRIX, _I64, _I64, _PTR, _PTR),
    "krasis_pack_cpu_tiles_from_q8_0": (_PTR, _I64, _I64, _I64, _I64, _PTR),
    "krasis_pack_cpu_tiles_from_mxfp4": (_PTR, _I64, _I64, _I64, _I64, _PTR),
    "krasis_pack_marlin_from_mxfp4": (_PTR, _I64, _I64, _I64, _I64, _PTR, _PTR),
    "krasis_pack_int8_rows": (*_MATRIX, _PTR, _PTR),
}


# dtype of blocks -> the tiles that hold them without loss, what packs them, and its limit for ``bad_row``
_BLOCKS = {
    "Q8_0": ("q8", "krasis_pack_cpu_tiles_from_q8_0", math.inf),
    "MXFP4": ("mxfp4", "krasis_pack_cpu_tiles_from_mxfp4", float(mxfp4.LARGEST_SCALE)),
}


@functools.cache
def _function(name: str) -> Any:
    function = getattr(library(), name)
    function.argtypes = [_PTR, *_ARGUMENTS[name], ctypes.POINTER(_Stats)]
    function.restype = _I32
    return function


def _call(
    pool: Pool, name: str, arguments: tuple[Any, ...], matrix: MatrixView, limit: float, where: str
) -> PackStats:
    stats = _Stats(nonfinite_row=-1)
    status = _function(name)(pool.handle, *arguments, ctypes.byref(stats))
    if status == STATUS_NONFINITE:
        raise bad_row(matrix, int(stats.nonfinite_row), limit, where)
    check(status, name)
    return PackStats(stats.squared_error, stats.squared_sum, stats.max_abs_error, stats.count)


def bad_row(matrix: MatrixView, row: int, limit: float, where: str) -> FormatError:
    """What is wrong with a row that cannot be packed. limit: the largest weight that scales can hold, of
    MXFP4 the largest scale."""
    if matrix.dtype == "MXFP4":
        holds = "float32" if limit == mxfp4.LARGEST_SCALE else "the GPU's bfloat16"
        return FormatError(
            f"scale of an MXFP4 block is NaN, or beyond what {holds} holds",
            where=where,
            got=f"exponent {mxfp4.split_blocks(matrix.data[row : row + 1])[1].max()} in row {row}",
            limit=int(limit),
            hint="the source file is damaged",
        )
    values = MatrixView(matrix.data[row : row + 1], matrix.dtype).to_float32()[0]
    broken = np.flatnonzero(~np.isfinite(values))
    if broken.size:
        return FormatError(
            "NaN or infinity among the weights",
            where=where,
            got=f"{values[broken[0]]} at row {row}, column {broken[0]}",
            hint="the source file is damaged, or the model's training diverged",
        )
    return FormatError(
        "weight is too large for a 16-bit floating-point scale",
        where=where,
        got=f"{np.abs(values).max():g} in row {row}",
        limit=f"{limit:g}",
        hint="bfloat16 scales have the range of float32",
    )


def _floats(matrix: MatrixView, where: str) -> tuple[int, int, int, int, int]:
    if matrix.dtype not in DTYPE_CODES:
        raise NativeError(
            "matrix must hold floats", where=where, got=matrix.dtype, limit=", ".join(DTYPE_CODES)
        )
    return matrix.address, DTYPE_CODES[matrix.dtype], matrix.n, matrix.k, matrix.row_stride


def _importance(importance: npt.NDArray[np.float32] | None, k: int, where: str) -> int | None:
    """Its address. Raises FormatError unless None or float32 [k], finite, not negative, one above zero."""
    if importance is None:
        return None
    if importance.dtype != np.float32 or importance.shape != (k,) or not importance.flags.c_contiguous:
        raise FormatError(
            "importance has the wrong form",
            where=where,
            got=f"{importance.dtype} {importance.shape}",
            limit=f"contiguous float32 ({k},)",
        )
    if not np.isfinite(importance).all() or float(importance.min()) < 0 or float(importance.max()) <= 0:
        raise FormatError("importance must be finite, not negative, and above zero somewhere", where=where)
    return int(importance.ctypes.data)


def writable(array: npt.NDArray[Any], dtype: Any, shape: tuple[int, ...], where: str) -> int:
    """The address of an array for a kernel to fill. Raises NativeError unless it is exactly of that form."""
    if (
        array.dtype != dtype
        or array.shape != shape
        or not array.flags.c_contiguous
        or not array.flags.writeable
    ):
        raise NativeError(
            "output array has the wrong form",
            where=where,
            got=f"{array.dtype} {array.shape}",
            limit=f"contiguous, writable {np.dtype(dtype)} {shape}",
        )
    return int(array.ctypes.data)


def pack_marlin(
    pool: Pool,
    matrix: MatrixView,
    codes: npt.NDArray[np.uint32],
    scales: npt.NDArray[np.uint16],
    *,
    bits: int,
    group: int,
    scale_dtype: str,
    n_offset: int = 0,
    importance: npt.NDArray[np.float32] | None = None,
    where: str = "",
) -> PackStats:
    """Quantises a matrix [n, k] into columns n_offset.. of a Marlin weight.

    codes: uint32 [k/16, n_total*bits/2]. scales: bit patterns of scale_dtype (BF16, F16), [k/group, n_total].
    group: 32, 64, 128 or k. importance: float32 [k] or None; it has no say where 4 bits take the matrix's
    own steps. Raises FormatError for weights not finite.
    """
    if bits not in (4, 8) or scale_dtype not in ("BF16", "F16") or group <= 0 or scales.ndim != 2:
        raise NativeError(
            "unknown Marlin parameters", where=where, got=f"{bits} bits, group {group}, {scale_dtype}"
        )
    n_total = int(scales.shape[1])
    source, weigh = _floats(matrix, where), _importance(importance, matrix.k, where)
    target = (
        writable(codes, np.uint32, (matrix.k // 16, n_total * bits // 2), where),
        writable(scales, np.uint16, (matrix.k // group, n_total), where),
        DTYPE_CODES[scale_dtype],
    )
    limit = _F16_LARGEST * (8 if bits == 4 else 127) if scale_dtype == "F16" else math.inf
    steps = given_steps(matrix, group, scale_dtype) if bits == 4 else None
    if steps is not None:
        given = (*source, group, n_offset, n_total, steps.ctypes.data, *target)
        return _call(pool, "krasis_pack_marlin_steps", given, matrix, limit, where)
    arguments = (*source, bits, group, n_offset, n_total, weigh, *target)
    return _call(pool, "krasis_pack_marlin", arguments, matrix, limit, where)


def pack_cpu_tiles(
    pool: Pool,
    matrix: MatrixView,
    out: npt.NDArray[np.uint8],
    *,
    tiles: str,
    part_rows: int = 32,
    part_offset: int = 0,
    importance: npt.NDArray[np.float32] | None = None,
    where: str = "",
) -> PackStats:
    """Packs a matrix [n, k] of floats or blocks into its rows of a weight of n * 32 / part_rows rows.

    tiles: ``q8`` or ``i4``; blocks of Q8_0 go into q8 only, blocks of MXFP4 into ``mxfp4``, which takes
    nothing else, both without loss. out: uint8, all tiles of the weight.
    """
    if part_rows not in (16, 32):
        raise NativeError("a part has 16 or 32 rows of each tile", where=where, got=part_rows)
    tile_bytes = {"q8": 1088, "i4": 576, "mxfp4": 544}[tiles]
    num_tiles = (matrix.n // part_rows) * (matrix.k // 32)
    target = writable(out, np.uint8, (num_tiles * tile_bytes,), where)
    if matrix.dtype in _BLOCKS or tiles == "mxfp4":
        return _pack_blocks(pool, matrix, tiles, part_rows, part_offset, target, where)
    source, weigh = _floats(matrix, where), _importance(importance, matrix.k, where)
    limit = _F16_LARGEST * (8 if tiles == "i4" else 127)
    steps = given_steps(matrix, STEP_K, "F16") if tiles == "i4" else None
    if steps is not None:
        given = (*source, part_rows, part_offset, steps.ctypes.data, target)
        return _call(pool, "krasis_pack_cpu_tiles_steps", given, matrix, limit, where)
    arguments = (TILE_CODES[tiles], *source, part_rows, part_offset, weigh, target)
    return _call(pool, "krasis_pack_cpu_tiles", arguments, matrix, limit, where)


def _pack_blocks(
    pool: Pool, matrix: MatrixView, tiles: str, part_rows: int, part_offset: int, target: int, where: str
) -> PackStats:
    if matrix.dtype not in _BLOCKS:
        raise NativeError(f"tiles of {tiles} take blocks of that type only", where=where, got=matrix.dtype)
    fitting, function, limit = _BLOCKS[matrix.dtype]
    if tiles != fitting:
        raise NativeError(
            f"{matrix.dtype} blocks fit {fitting} tiles only; dequantise them first", where=where, got=tiles
        )
    _check_contiguous(matrix, where)
    arguments = (matrix.address, matrix.n, matrix.k, part_rows, part_offset, target)
    return _call(pool, function, arguments, matrix, limit, where)


def _check_contiguous(matrix: MatrixView, where: str) -> None:
    if matrix.row_stride != matrix.data.shape[1]:
        raise NativeError(
            f"rows of {matrix.dtype} must be contiguous", where=where, got=f"row stride {matrix.row_stride}"
        )


def pack_marlin_from_mxfp4(
    pool: Pool,
    matrix: MatrixView,
    codes: npt.NDArray[np.uint32],
    scales: npt.NDArray[np.uint8],
    *,
    n_offset: int,
    largest_scale: int,
    where: str = "",
) -> PackStats:
    """Writes blocks of MXFP4 [n, k] into columns n_offset.. of a Marlin weight, without loss.

    codes: uint32 [k/16, 2 * n_total]; scales: uint8 [k/32, n_total]. largest_scale: that the function takes.
    Raises FormatError for a larger one.
    """
    if matrix.dtype != "MXFP4":
        raise NativeError("blocks of MXFP4 are packed so", where=where, got=matrix.dtype)
    _check_contiguous(matrix, where)
    n_total = int(scales.shape[1])
    arguments = (
        matrix.address,
        matrix.n,
        matrix.k,
        n_offset,
        n_total,
        writable(codes, np.uint32, (matrix.k // 16, 2 * n_total), where),
        writable(scales, np.uint8, (matrix.k // mxfp4.BLOCK_K, n_total), where),
    )
    return _call(pool, "krasis_pack_marlin_from_mxfp4", arguments, matrix, float(largest_scale), where)


def pack_int8_rows(
    pool: Pool,
    matrix: MatrixView,
    codes: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    *,
    where: str = "",
) -> PackStats:
    """Packs a matrix [n, k] into codes int8 [n/32, k/4, 32, 4] with scales float32 [n]."""
    arguments = (
        *_floats(matrix, where),
        writable(codes, np.int8, (matrix.n // 32, matrix.k // 4, 32, 4), where),
        writable(scales, np.float32, (matrix.n,), where),
    )
    return _call(pool, "krasis_pack_int8_rows", arguments, matrix, math.inf, where)
