"""Mapped arrays brought to the device through two small pinned buffers: the host copies into one while the
other travels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.runtime.device.api import Device, Event, Stream

Array = npt.NDArray[Any]
PIECE_BYTES = 16 * 2**20
# NumPy has no bf16: a bundle's BF16 blob is mapped as uint16, and its bytes are what is copied.
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Uploader:
    """Copies on one stream. ``finish`` before the buffers are dropped. piece_bytes: of each of the two."""

    def __init__(self, device: Device, stream: Stream, piece_bytes: int = PIECE_BYTES) -> None:
        self._device, self._stream = device, stream
        self._pieces = [device.pinned((piece_bytes,), torch.uint8) for _ in range(2)]
        self._sent: list[Event | None] = [None, None]
        self._next = 0

    def put(self, source: Array, destination: torch.Tensor) -> None:
        """Copies the bytes of source to a contiguous device tensor of as many bytes; the host may go on
        before they arrive, the source may not change until ``finish``.
        """
        raw = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
        target = destination.view(-1).view(torch.uint8)
        size = self._pieces[0].numel()
        for begin in range(0, raw.size, size):
            part = raw[begin : begin + size]
            piece = self._free_piece()[: part.size]
            np.copyto(piece.numpy(), part)
            self._stream.copy(target[begin : begin + part.size], piece)
            self._sent[self._next] = self._stream.record()
            self._next ^= 1

    def finish(self) -> None:
        """Waits until everything arrived."""
        self._stream.synchronize()

    def _free_piece(self) -> torch.Tensor:
        sent, piece = self._sent[self._next], self._pieces[self._next]
        if sent is not None:
            sent.synchronize()
        self._device.host_writes(piece)
        return piece
