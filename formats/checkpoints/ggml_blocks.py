"""The block types of GGML tensors: sizes, and dequantisation through the ``gguf`` package's NumPy code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import quants

from krasis.formats.errors import FormatError
from krasis.formats.files.regular_file import Bytes
from krasis.formats.limits import checked_mul

# type name -> (elements a block, bytes a block)
BLOCK_SIZES: dict[str, tuple[int, int]] = {
    kind.name: (int(elements), int(num_bytes))
    for kind, (elements, num_bytes) in gguf.GGML_QUANT_SIZES.items()
}
# number in the file -> name
TYPE_NAMES: dict[int, str] = {int(kind): kind.name for kind in gguf.GGML_QUANT_SIZES}

_FLOATS: dict[str, np.dtype[np.floating[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
}


def _is_dequantizable(name: str) -> bool:
    """Asks the package itself, with one block of zeros: its table is private and changes with versions."""
    block = np.zeros((1, BLOCK_SIZES[name][1]), dtype=np.uint8)
    try:
        quants.dequantize(block, gguf.GGMLQuantizationType[name])
    except NotImplementedError:
        return False
    return True


# Types whose tensors can be turned into floats. Integer types hold no weights.
SUPPORTED_TYPES: tuple[str, ...] = tuple(
    name
    for name in BLOCK_SIZES
    if name in _FLOATS or (name not in ("I8", "I16", "I32", "I64") and _is_dequantizable(name))
)


def block_size(type_name: str, where: str = "") -> tuple[int, int]:
    """(elements, bytes) of a block. FormatError for an unknown type."""
    size = BLOCK_SIZES.get(type_name)
    if size is None:
        raise FormatError("unknown GGML type", where=where, got=type_name, limit=", ".join(BLOCK_SIZES))
    return size


def row_bytes(type_name: str, num_elements: int, where: str = "") -> int:
    """Bytes of a row of ``num_elements``. Errors as ``tensor_bytes``."""
    return tensor_bytes(type_name, (num_elements,), where)


def tensor_bytes(type_name: str, shape: Sequence[int], where: str = "") -> int:
    """Bytes of a tensor with row-major ``shape``. FormatError if a row is not a whole number of blocks, or on
    overflow.
    """
    elements, num_bytes = block_size(type_name, where)
    if shape and shape[-1] % elements:
        raise FormatError(
            f"a row is not a whole number of {type_name} blocks",
            where=where,
            got=shape[-1],
            limit=f"multiples of {elements}",
        )
    return checked_mul([checked_mul(shape, where) // elements, num_bytes], where)


def dequantize(raw: Bytes, type_name: str, shape: Sequence[int], where: str = "") -> npt.NDArray[np.float32]:
    """float32 array of ``shape`` from a tensor's bytes (uint8, any shape, C-contiguous).

    Raises FormatError for a type that cannot be dequantised or bytes that do not fit the shape. Non-finite
    weights pass.
    """
    if type_name not in SUPPORTED_TYPES:
        raise FormatError(
            "this GGML type cannot be dequantised",
            where=where,
            got=type_name,
            limit=", ".join(SUPPORTED_TYPES),
        )
    num_bytes = tensor_bytes(type_name, shape, where)
    if raw.nbytes != num_bytes:
        raise FormatError(
            "tensor has another size than its shape", where=where, got=raw.nbytes, limit=num_bytes
        )
    if type_name in _FLOATS:
        floats = np.frombuffer(raw.reshape(-1), dtype=_FLOATS[type_name])
        return floats.reshape(shape).astype(np.float32)
    elements, block_bytes = BLOCK_SIZES[type_name]
    rows = raw.reshape(-1, shape[-1] // elements * block_bytes)
    with np.errstate(
        all="ignore"
    ):  # odd scales give inf or nan, which the caller reports with the tensor's name
        values = quants.dequantize(rows, gguf.GGMLQuantizationType[type_name])
    return np.ascontiguousarray(values, dtype=np.float32).reshape(shape)
