"""Weight matrices as packers take them, the errors of packing, and bfloat16 for NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError
from krasis.formats.layouts import mxfp4

Array = npt.NDArray[Any]

Q8_0_BLOCK_BYTES = 34
Q8_0_BLOCK_K = 32

_NUMPY_DTYPES = {
    "F32": ("float32",),
    "BF16": ("uint16",),
    "F16": ("float16", "uint16"),
    "Q8_0": ("uint8",),
    "MXFP4": ("uint8",),
}
# (weights, bytes) of a block of a type that is made of blocks.
_BLOCKS = {"Q8_0": (Q8_0_BLOCK_K, Q8_0_BLOCK_BYTES), "MXFP4": (mxfp4.BLOCK_K, mxfp4.BLOCK_BYTES)}


def bf16_to_float32(values: Array) -> npt.NDArray[np.float32]:
    """bfloat16 bit patterns (uint16, any shape) as float32, exactly."""
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bf16(values: Array) -> npt.NDArray[np.uint16]:
    """Finite float32 values as bfloat16 bit patterns, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


@dataclass(frozen=True, slots=True, eq=False)
class MatrixView:
    """A weight [n output features, k input features] in memory; nothing is copied.

    data: two-dimensional, rows may be strided, elements of a row adjacent. float32 for ``F32``, uint16
    for ``BF16``, float16 or uint16 for ``F16``; for ``Q8_0`` uint8 [n, k/32*34] and for ``MXFP4`` uint8
    [n, k/32*17], blocks as ggml stores them. steps: of ``F32``, the scales [n, k/32] that each 32 weights are
    -8..7 whole steps of, where they are known: packers to 4 bits keep them if they can.
    Raises FormatError if data is not of that form.
    """

    data: Array
    dtype: str
    steps: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        allowed = _NUMPY_DTYPES.get(self.dtype)
        if allowed is None:
            raise FormatError("matrix has an unknown dtype", got=self.dtype, limit=", ".join(_NUMPY_DTYPES))
        data = self.data
        if data.ndim != 2 or 0 in data.shape:
            raise FormatError("matrix must have two dimensions, none empty", got=f"shape {data.shape}")
        if data.dtype.name not in allowed or not data.dtype.isnative:
            raise FormatError(
                f"array of a {self.dtype} matrix has the wrong dtype",
                got=data.dtype,
                limit=" or ".join(allowed),
            )
        row_bytes = data.shape[1] * data.itemsize
        adjacent = data.strides[1] == data.itemsize or data.shape[1] == 1
        in_order = data.strides[0] >= row_bytes and data.strides[0] % data.itemsize == 0
        if not adjacent or not (in_order or data.shape[0] == 1):
            raise FormatError(
                "rows of a matrix must be contiguous and in order",
                got=f"strides {data.strides} for shape {data.shape}",
            )
        block_bytes = _BLOCKS.get(self.dtype, (1, 1))[1]
        if data.shape[1] % block_bytes:
            raise FormatError(
                f"rows of {self.dtype} must be whole blocks",
                got=f"{data.shape[1]} bytes",
                limit=f"multiple of {block_bytes}",
            )

        if self.steps is not None:
            _check_steps(self.steps, self.dtype, data)

    @property
    def n(self) -> int:
        """Output features (rows)."""
        return int(self.data.shape[0])

    @property
    def k(self) -> int:
        """Input features (columns), in weights."""
        weights, num_bytes = _BLOCKS.get(self.dtype, (1, 1))
        return int(self.data.shape[1]) // num_bytes * weights

    @property
    def row_stride(self) -> int:
        """Distance between rows in elements of ``data``."""
        if self.n == 1:
            return int(self.data.shape[1])
        return int(self.data.strides[0]) // int(self.data.itemsize)

    @property
    def address(self) -> int:
        """Address of the first element."""
        return int(self.data.ctypes.data)

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The weights [n, k] as a new float32 array."""
        if self.dtype == "BF16":
            return bf16_to_float32(self.data)
        if self.dtype == "F16":
            return self.data.view(np.float16).astype(np.float32)
        if self.dtype == "Q8_0":
            blocks = np.ascontiguousarray(self.data).reshape(self.n, -1, Q8_0_BLOCK_BYTES)
            scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
            return (blocks[..., 2:].view(np.int8) * scales).reshape(self.n, self.k)
        if self.dtype == "MXFP4":
            return mxfp4.dequantize(*mxfp4.split_blocks(np.ascontiguousarray(self.data)))
        return self.data.astype(np.float32, copy=True)


def _check_steps(steps: Array, dtype: str, data: Array) -> None:
    n, k = data.shape
    if dtype != "F32" or k % 32 or steps.dtype != np.float32 or steps.shape != (n, k // 32):
        got = f"{steps.dtype} {steps.shape} for {dtype} {data.shape}"
        raise FormatError("steps do not fit the matrix", got=got)


@dataclass(frozen=True, slots=True)
class PackStats:
    """What packing lost, against the source after dequantisation. Add them up with ``+``.

    squared_error: sum of squared differences. squared_sum: sum of squared weights. count: weights.
    """

    squared_error: float = 0.0
    squared_sum: float = 0.0
    max_abs_error: float = 0.0
    count: int = 0

    def __add__(self, other: PackStats) -> PackStats:
        return PackStats(
            self.squared_error + other.squared_error,
            self.squared_sum + other.squared_sum,
            max(self.max_abs_error, other.max_abs_error),
            self.count + other.count,
        )

    @property
    def relative_mse(self) -> float:
        """squared_error / squared_sum; 0 for weights that are all zero."""
        return self.squared_error / self.squared_sum if self.squared_sum else 0.0
