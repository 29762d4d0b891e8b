"""What decode looks up of its rows' tokens beside embeddings: nothing, but of models with hashed tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from krasis.runtime.batch import Span
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.streams import begin_streams
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.model import GpuModel


class LookedUp:
    """The rows of tables that the next tokens of up to max_rows sequences choose, where the host writes
    them."""

    def __init__(self, model: GpuModel, max_rows: int) -> None:
        self._kernels, self._tables = model.kernels, model.tables
        self._rows = None if model.tables is None else model.tables.pinned(max_rows)

    def set(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """(token, position, slot) of each row of the next token; nothing may be reading the last ones."""
        if self._tables is None or self._rows is None:
            return
        spans = [Span(slot, row, 1, at, "last") for row, (_, at, slot) in enumerate(rows)]
        places = self._tables.places(np.array([token for token, *_ in rows], np.int64), spans)
        self._tables.gather(places, self._rows[: len(rows)])

    def begin(self, stream: Stream, b: Buffers, flag: torch.Tensor, epoch: torch.Tensor) -> None:
        """They come to the device, and every residual stream begins as the embedding. flag: that nobody
        waits for; epoch: any number."""
        if self._rows is not None:
            self._kernels.fetch(stream, ((b.table_rows, self._rows[: len(b.table_rows)]),), flag, epoch)
        begin_streams(stream, b)
