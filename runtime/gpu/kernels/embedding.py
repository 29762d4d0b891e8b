"""Embedding rows: gathered on the host, where the table stays, and copied to the device in their own
precision."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.process.machine_limits import usable_cpus
from krasis.runtime.backend import TokenIds
from krasis.runtime.cpu.weights import FloatWeight
from krasis.runtime.device.api import Device, Event, Stream
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.upload import TORCH_DTYPES

ROWS = 1024
MOST_THREADS = 8
"""Threads that gather embedding rows. One needs longer than the link for one layer's experts."""


class Embedding:
    """rows: tokens gathered into one of two pinned buffers while the other travels."""

    def __init__(self, device: Device, weight: FloatWeight, rows: int = ROWS) -> None:
        self._device, self._weight = device, weight
        self._dtype = TORCH_DTYPES[weight.dtype]
        shape = (rows, weight.data.shape[1])
        self._pieces = [device.pinned(shape, self._dtype) for _ in range(2)]
        self._sent: list[Event | None] = [None, None]
        self._num_threads = min(MOST_THREADS, usable_cpus())
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="krasis-embedding")

    def run(
        self, stream: Stream, tokens: TokenIds, segments: Sequence[tuple[int, int]], buffers: Buffers
    ) -> None:
        """buffers.hidden = the rows of the tokens of the segments, one after the other. Uses buffers.x for
        passage."""
        own = np.concatenate([tokens[begin:end] for begin, end in segments]) if segments else tokens[:0]
        most = len(self._pieces[0])
        for index, begin in enumerate(range(0, len(own), most)):
            ids = own[begin : begin + most]
            piece = self._gather(index % 2, ids)
            hidden = buffers.hidden[begin : begin + len(ids)]
            if self._dtype == torch.float32:
                stream.copy(hidden, piece)
            else:
                passage = buffers.x[begin : begin + len(ids)].view(self._dtype)
                stream.copy(passage, piece)
                _widen(stream, passage, hidden)
            if self._weight.factor != 1.0:
                _multiply(stream, hidden, self._weight.factor)
            self._sent[index % 2] = stream.record()

    def _gather(self, index: int, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        sent, piece = self._sent[index], self._pieces[index][: len(ids)]
        if sent is not None:
            sent.synchronize()
        self._device.host_writes(piece)
        host: npt.NDArray[Any] = piece.view(torch.int16 if piece.element_size() == 2 else torch.int32).numpy()
        out = host.view(self._weight.data.dtype)
        share = -(-len(ids) // self._num_threads)

        def gather(begin: int) -> None:
            # "clip": NumPy would otherwise gather into a buffer of its own first; the ids were checked by the
            # engine. NumPy lets go of the interpreter's lock here.
            part = slice(begin, begin + share)
            np.take(self._weight.data, ids[part], axis=0, out=out[part], mode="clip")

        list(self._threads.map(gather, range(0, len(ids), share)))
        return piece


def _widen(stream: Stream, source: torch.Tensor, destination: torch.Tensor) -> None:
    def action(_: int) -> None:
        destination.copy_(source)

    stream.launch("widen embedding", action, reads=(source,), writes=(destination,))


def _multiply(stream: Stream, rows: torch.Tensor, factor: float) -> None:
    def action(_: int) -> None:
        rows.mul_(factor)

    stream.launch("scale embedding", action, reads=(rows,), writes=(rows,))
