"""Tensors as the kernels want them: checked shape, type and contiguity, given as addresses.

Raises NativeError for any other tensor. That they lie in device memory is checked by ``Stream.launch``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from krasis.formats.errors import NativeError

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODE_OF_INT8 = 3  # of keys and values alone
FLOATS = tuple(CODES)
HALVES = (torch.bfloat16, torch.float16)
F32 = (torch.float32,)
I8 = (torch.int8,)
U8 = (torch.uint8,)
I32 = (torch.int32,)
I64 = (torch.int64,)
VECTOR_BYTES = 16


def pointer(tensor: torch.Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], where: str) -> int:
    """The address of a contiguous tensor of that shape and one of those types."""
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise _mismatch(tensor, shape, dtypes, where)
    if not tensor.is_contiguous():
        raise NativeError("tensor must be contiguous", where=where, got=f"strides {tensor.stride()}")
    return tensor.data_ptr()


def vector_pointer(
    tensor: torch.Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], where: str
) -> int:
    """As ``pointer``, and a multiple of 16 bytes."""
    return aligned(pointer(tensor, shape, dtypes, where), where)


def optional_pointer(
    tensor: torch.Tensor | None, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], where: str
) -> int | None:
    """As ``pointer``; None for None."""
    return None if tensor is None else pointer(tensor, shape, dtypes, where)


def row_pointer(
    tensor: torch.Tensor, shape: tuple[int, int], dtypes: Sequence[torch.dtype], where: str
) -> tuple[int, int]:
    """(address, elements from row to row) of a matrix of contiguous rows, both multiples of 16 bytes."""
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise _mismatch(tensor, shape, dtypes, where)
    num_rows, num_columns = shape
    # torch may give a single row any stride.
    stride = tensor.stride(0) if num_rows > 1 else num_columns
    if (num_columns > 1 and tensor.stride(1) != 1) or stride < num_columns:
        raise NativeError("rows must be contiguous and apart", where=where, got=f"strides {tensor.stride()}")
    aligned(stride * tensor.element_size(), where)
    return aligned(tensor.data_ptr(), where), stride


def aligned(address: int, where: str) -> int:
    """An address or distance in bytes."""
    if address % VECTOR_BYTES:
        raise NativeError(
            "not aligned", where=where, got=hex(address), limit=f"multiples of {VECTOR_BYTES} bytes"
        )
    return address


def matrix(tensor: torch.Tensor, where: str) -> tuple[int, int]:
    """The shape of a matrix."""
    if tensor.dim() != 2:
        raise NativeError("tensor must have two dimensions", where=where, got=list(tensor.shape))
    return tensor.shape[0], tensor.shape[1]


def require(condition: bool, what: str, where: str, got: object, limit: object) -> None:
    """Raises NativeError unless the condition holds."""
    if not condition:
        raise NativeError(what, where=where, got=got, limit=limit)


def _mismatch(
    tensor: torch.Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], where: str
) -> NativeError:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return NativeError(
        "tensor has the wrong shape or type",
        where=where,
        got=f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}",
        limit=f"{names} {list(shape)}",
    )
