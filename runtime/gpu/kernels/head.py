"""The output head: logits of the last row, or of all, on rank 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from krasis.formats.layouts import padded_rows
from krasis.runtime.backend import Logits
from krasis.runtime.batch import Batch
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.chunk import Chunk
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.planning.workspace import LOGIT_ROWS


class Head:
    """Final norm and output projection. The results are views of a pinned buffer that the next call
    overwrites, unless all rows are asked for.
    """

    def __init__(self, model: GpuModel, parallel: Parallel) -> None:
        self._model, self._parallel = model, parallel
        self._vocab = model.spec.vocab
        shape = (LOGIT_ROWS, padded_rows(model.spec.vocab))
        self._host = model.device.pinned(shape, torch.float32)

    def of(self, batch: Batch, chunk: Chunk, buffers: Buffers) -> Logits:
        """The logits that a batch wants, [0, vocab] on ranks above 0; see ``rows`` and ``all``."""
        if len(batch.spans) == 1 and batch.spans[0].logits == "all":
            return self.all(chunk, buffers)
        if self._parallel.num_ranks > 1:
            return self.rows([chunk.own - 1] if batch.num_logits else [], buffers)
        return self.rows(batch.wanted_rows(), buffers)

    def rows(self, rows: Sequence[int], buffers: Buffers) -> Logits:
        """[rows, vocab] of so many own rows, ascending: a view for one, else a new array; [0, vocab] on ranks
        above 0, which have not the last token of a chunk.
        """
        if self._parallel.rank or not rows:
            self._model.stream.synchronize()
            return np.empty((0, self._vocab), np.float32)
        for index, row in enumerate(rows):  # ascending: no row of x is wanted that is overwritten here
            self._norm(buffers.hidden[row : row + 1], buffers.x[index : index + 1])
        if len(rows) == 1:
            return self._project(buffers.x[:1], buffers)
        result = np.empty((len(rows), self._vocab), np.float32)
        for begin in range(0, len(rows), len(buffers.logits)):
            part = buffers.x[begin : min(begin + len(buffers.logits), len(rows))]
            result[begin : begin + len(part)] = self._project(part, buffers)
        return result

    def all(self, chunk: Chunk, buffers: Buffers) -> Logits:
        """[T, vocab] of all tokens, a new array; [0, vocab] on other ranks."""
        stream = self._model.stream
        if chunk.own:
            self._norm(buffers.hidden[: chunk.own], buffers.x[: chunk.own])
        self._parallel.gather_tokens(stream, buffers.x, buffers.gathered_x, chunk.num_tokens)
        self._parallel.restore_order(stream, buffers.gathered_x, buffers.ordered_x, chunk.num_tokens)
        if self._parallel.rank:
            stream.synchronize()
            return np.empty((0, self._vocab), np.float32)
        result = np.empty((chunk.num_tokens, self._vocab), np.float32)
        for begin in range(0, chunk.num_tokens, len(buffers.logits)):
            rows = buffers.ordered_x[begin : begin + len(buffers.logits)]
            result[begin : begin + len(rows)] = self._project(rows, buffers)
        return result

    def _norm(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        m = self._model
        m.kernels.rms_norm(m.stream, hidden, m.weights.final_norm, m.spec.norm.eps, x)

    def _project(self, x: torch.Tensor, buffers: Buffers) -> Logits:
        m = self._model
        logits, host = buffers.logits[: len(x)], self._host[: len(x)]
        weight = m.weights.lm_head
        m.kernels.int8_gemm(m.stream, x, weight.codes, weight.scales, logits)
        m.device.host_writes(host)
        m.stream.copy(host, logits)
        m.stream.synchronize()
        m.device.host_reads(host)
        return host.numpy()[:, : self._vocab]
