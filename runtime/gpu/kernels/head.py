"""The output head: logits of the rows that a batch wants, on rank 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from krasis.formats.layouts import padded_rows
from krasis.runtime.backend import Logits
from krasis.runtime.batch import Batch
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.streams import GpuEnd
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.chunk import Chunk
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.planning.workspace import LOGIT_ROWS


class Head:
    """Final norm and output projection. One row is a view of a pinned buffer that the next call
    overwrites."""

    def __init__(self, model: GpuModel, parallel: Parallel) -> None:
        self._model, self._parallel = model, parallel
        self._vocab = model.spec.vocab
        self._end = GpuEnd(model)
        shape = (LOGIT_ROWS, padded_rows(model.spec.vocab))
        self._host = model.device.pinned(shape, torch.float32)

    def of(self, batch: Batch, chunk: Chunk, buffers: Buffers) -> Logits:
        """The logits that a batch wants, [wanted, vocab]; [0, vocab] on ranks above 0. A view if it is one
        row, else a new array.
        """
        rows = batch.wanted_rows()
        if not rows:
            self._model.stream.synchronize()
            return self._none()
        if self._parallel.num_ranks == 1:
            return self._own_rows(rows, buffers)
        if gathers(chunk):
            return self._gathered_rows(rows, chunk, buffers)
        return self._own_rows([chunk.own - 1], buffers)

    def _own_rows(self, rows: Sequence[int], buffers: Buffers) -> Logits:
        """Of so many own rows, ascending."""
        if self._parallel.rank:
            self._model.stream.synchronize()
            return self._none()
        if len(rows) == len(buffers.hidden):
            self._end.read(buffers, range(len(rows)))
        else:
            for index, row in enumerate(rows):  # ascending: no row of x is wanted that is overwritten here
                self._end.read(buffers, range(row, row + 1), index)
        return self._project_all(buffers.x[: len(rows)], buffers)

    def _gathered_rows(self, rows: Sequence[int], chunk: Chunk, buffers: Buffers) -> Logits:
        """Of so many rows of all ranks, ascending."""
        stream = self._model.stream
        if chunk.own:
            self._end.read(buffers, range(chunk.own))
        self._parallel.gather_tokens(stream, buffers.x, buffers.gathered_x, chunk.num_tokens)
        if self._parallel.rank:
            stream.synchronize()
            return self._none()
        ordered = buffers.ordered_x
        self._parallel.restore_order(stream, buffers.gathered_x, ordered, chunk.lengths)
        if len(rows) < chunk.num_tokens:
            ordered = _pick(stream, ordered, rows)
        return self._project_all(ordered, buffers)

    def _project_all(self, x: torch.Tensor, buffers: Buffers) -> Logits:
        """Of many rows of x, a part at a time."""
        if len(x) == 1:
            return self._project(x, buffers)
        result = np.empty((len(x), self._vocab), np.float32)
        for begin in range(0, len(x), len(buffers.logits)):
            part = x[begin : begin + len(buffers.logits)]
            result[begin : begin + len(part)] = self._project(part, buffers)
        return result

    def _none(self) -> Logits:
        return np.empty((0, self._vocab), np.float32)

    def _project(self, x: torch.Tensor, buffers: Buffers) -> Logits:
        m = self._model
        logits, host = buffers.logits[: len(x)], self._host[: len(x)]
        weight = m.weights.lm_head
        m.kernels.int8_gemm(m.stream, x, weight.codes, weight.scales, logits)
        cap_logits(m.stream, logits, m.spec.logits_cap)
        m.device.host_writes(host)
        m.stream.copy(host, logits)
        m.stream.synchronize()
        m.device.host_reads(host)
        return host.numpy()[:, : self._vocab]


def cap_logits(stream: Stream, logits: torch.Tensor, cap: float | None) -> None:
    """logits = cap tanh(logits / cap), in place; as they are without a cap."""
    if cap is None:
        return

    def action(_: int) -> None:
        logits.div_(cap).tanh_().mul_(cap)

    stream.launch("cap logits", action, reads=(logits,), writes=(logits,))


def gathers(chunk: Chunk) -> bool:
    """Whether several ranks exchange rows for the logits: not for those of one last token, which rank 0
    has."""
    wanted = sum(span.num_logits for span in chunk.spans)
    return wanted > 0 and not (len(chunk.spans) == 1 and chunk.spans[0].logits == "last")


def _pick(stream: Stream, x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The rows of x, ascending, moved to its beginning."""
    picked = x[: len(rows)]

    def action(_: int) -> None:
        picked.copy_(x[torch.tensor(rows, device=x.device)])

    stream.launch("pick rows", action, reads=(x,), writes=(picked,))
    return picked
