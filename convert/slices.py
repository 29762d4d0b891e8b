"""A contiguous piece of a source tensor, as it lies in its memory-mapped file, and its decoding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.checkpoints.ggml_blocks import block_size, dequantize
from krasis.formats.errors import FormatError
from krasis.formats.layouts.matrix import MatrixView, bf16_to_float32

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

FLOAT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
NUMPY_FORM: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
}
_TOUCH_STRIDE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Whole rows of a tensor, contiguous in its file.

    tensor: its name in the file. where: file and tensor, for messages. dtype: ``F32``, ``BF16``, ``F16`` or a
    ggml type name. shape: in elements, ``(n, k)`` or ``(n,)``. raw: its bytes. offset_bytes: where raw begins
    in the tensor. total_bytes: size of the tensor.
    """

    tensor: str
    where: str
    dtype: str
    shape: tuple[int, ...]
    raw: Bytes
    offset_bytes: int
    total_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether the elements are plain floats, readable without dequantisation."""
        return self.dtype in FLOAT_BYTES

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (of one element for a vector)."""
        return self.raw.nbytes // self.shape[0]

    @property
    def block(self) -> tuple[int, int]:
        """(weights, bytes) of what cannot be divided."""
        return block_size(self.dtype, self.where)

    def rows(self, start: int, stop: int) -> TensorSlice:
        """Rows ``start`` to ``stop`` (clipped to the last)."""
        stop = min(stop, self.shape[0])
        row_bytes = self.row_bytes
        return TensorSlice(
            tensor=self.tensor,
            where=self.where,
            dtype=self.dtype,
            shape=(stop - start, *self.shape[1:]),
            raw=self.raw[start * row_bytes : stop * row_bytes],
            offset_bytes=self.offset_bytes + start * row_bytes,
            total_bytes=self.total_bytes,
        )

    def floats(self) -> npt.NDArray[Any]:
        """The elements in their own type, zero copy; BF16 as uint16. Only for ``is_float``."""
        if not self.is_float:
            raise FormatError("not a plain float tensor", where=self.where, got=self.dtype)
        return self.raw.view(NUMPY_FORM[self.dtype]).reshape(self.shape)

    def decode(self) -> Floats:
        """The elements as float32, any type."""
        if not self.is_float:
            return dequantize(self.raw, self.dtype, self.shape, self.where)
        values = self.floats()
        return bf16_to_float32(values) if self.dtype == "BF16" else values.astype(np.float32)

    def matrix(self) -> MatrixView:
        """The slice for a packer, dequantised to float32 where it is not a plain float type, with the scales
        of codes of 4 bits.
        """
        if self.is_float:
            values = self.floats()
            # A safetensors header may end anywhere; native code wants aligned elements.
            return MatrixView(values if values.flags.aligned else values.copy(), self.dtype)
        steps = None
        if self.dtype == "Q4_0":  # blocks of a float16 scale and 16 bytes of codes, which are -8..7
            blocks = self.raw.reshape(self.shape[0], -1, self.block[1])
            steps = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32)
        return MatrixView(self.decode(), "F32", steps)

    def keeps(self, dtype: str) -> bool:
        """Whether ``blocks`` of another type than its own, Q8_0 or MXFP4, have its weights without loss."""
        return False

    def blocks(self, dtype: str) -> MatrixView:
        """Its blocks of Q8_0 or MXFP4 for the lossless packer."""
        if self.dtype != dtype or dtype not in ("Q8_0", "MXFP4"):
            raise FormatError(f"not a tensor of {dtype}", where=self.where, got=self.dtype)
        return MatrixView(self.raw.reshape(self.shape[0], -1), self.dtype)

    def is_zero(self, block: int) -> bool:
        """Whether all weights of a block of the bytes are 0."""
        weights, num_bytes = self.block
        return not dequantize(self.raw[block * num_bytes :][:num_bytes], self.dtype, (weights,)).any()

    def companions(self) -> Iterable[tuple[str, Bytes]]:
        """Names and bytes of the other tensors that the weights are made of."""
        return ()

    def at_rows(self, places: npt.NDArray[np.int64]) -> TensorSlice:
        """The rows at these places, in their order."""
        rows = self.raw.reshape(self.shape[0], -1)[places]
        return replace(self, raw=np.ascontiguousarray(rows).reshape(-1), shape=(len(rows), *self.shape[1:]))

    def plain(self, values: Floats) -> TensorSlice:
        """The same rows with other weights, in float32."""
        return TensorSlice(
            tensor=self.tensor,
            where=self.where,
            dtype="F32",
            shape=self.shape,
            raw=np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8),
            offset_bytes=self.offset_bytes,
            total_bytes=self.total_bytes,
        )

    def touch(self) -> None:
        """Brings the bytes into memory without holding the interpreter lock during the disk's work."""
        if self.raw.nbytes:
            np.add.reduce(self.raw[::_TOUCH_STRIDE_BYTES], dtype=np.uint64)


def first_nonfinite_row(piece: TensorSlice) -> int | None:
    """The first row of a plain float slice that holds NaN or infinity, or None."""
    values = piece.floats().reshape(piece.shape[0], -1)
    is_bf16 = piece.dtype == "BF16"  # NumPy sees its bits: all ones in the exponent
    rows = ((values & 0x7F80) == 0x7F80 if is_bf16 else ~np.isfinite(values)).any(axis=1)
    return int(rows.argmax()) if rows.any() else None
