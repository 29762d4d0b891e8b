"""Mapped arrays brought to the device through a few small pinned buffers: threads of the host copy into some
while others travel.

One thread copies a mapping that nobody touched yet at a few gigabytes a second, page fault by page fault; the
link takes ten times as much.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.process.machine_limits import usable_cpus
from krasis.runtime.device.api import Device, Event, Stream

Array = npt.NDArray[Any]
PIECE_BYTES = 8 * 2**20
MAX_THREADS = 8
# NumPy has no bf16: a bundle's BF16 blob is mapped as uint16, and its bytes are what is copied.
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Uploader:
    """Copies on one stream. Close it, or use ``with``; ``finish`` before the destinations are used.
    piece_bytes: of each buffer, of which there are two a thread.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        piece_bytes: int = PIECE_BYTES,
        num_threads: int | None = None,
    ) -> None:
        threads = num_threads or min(MAX_THREADS, usable_cpus())
        self._device, self._stream = device, stream
        self._threads = ThreadPoolExecutor(threads, "krasis-upload")
        # Pinned at once: every call of the driver waits for those that pin experts meanwhile.
        self._pieces = device.pinned((2 * threads, piece_bytes), torch.uint8).unbind()
        self._sent: list[Event | None] = [None] * len(self._pieces)
        self._next = 0
        # Being filled, oldest first: the buffer's number, the bytes in it, where they go.
        self._filling: deque[tuple[int, torch.Tensor, torch.Tensor, Future[None]]] = deque()

    def put(self, source: Array, destination: torch.Tensor) -> None:
        """Copies the bytes of source to a contiguous device tensor of as many bytes; the host may go on
        before they arrive, the source may not change until ``finish``.
        """
        raw = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
        target = destination.view(-1).view(torch.uint8)
        size = self._pieces[0].numel()
        for begin in range(0, raw.size, size):
            part = raw[begin : begin + size]
            number, piece = self._free_piece(part.size)
            future = self._threads.submit(np.copyto, piece.numpy(), part)
            self._filling.append((number, piece, target[begin : begin + part.size], future))

    def finish(self) -> None:
        """Waits until everything arrived."""
        while self._filling:
            self._send()
        self._stream.synchronize()

    def close(self) -> None:
        """Ends the threads. Calling it again does nothing."""
        self._threads.shutdown()
        self._filling.clear()

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free_piece(self, num_bytes: int) -> tuple[int, torch.Tensor]:
        """The next buffer, once its bytes have gone. Half of the buffers travel, or may: what the host filled
        is sent as soon as there are so many, or it is there."""
        while self._filling and (2 * len(self._filling) >= len(self._pieces) or self._filling[0][3].done()):
            self._send()
        number = self._next
        self._next = (number + 1) % len(self._pieces)
        sent, piece = self._sent[number], self._pieces[number][:num_bytes]
        if sent is not None:
            sent.synchronize()
        self._device.host_writes(piece)
        return number, piece

    def _send(self) -> None:
        number, piece, target, future = self._filling.popleft()
        future.result()
        self._stream.copy(target, piece)
        self._sent[number] = self._stream.record()
