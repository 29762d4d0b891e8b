"""Gated residual streams on a GPU: what stands around the blocks, and what the head reads at the end.

The residual of such a model lies in ``Buffers.streams``. A block between streams finds what it reads in
``Buffers.normed`` and ``Buffers.x``, and adds to ``Buffers.hidden``, which is 0 when it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.blocks.rows import PassRows
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.kernels.router_product import router_product
from krasis.runtime.gpu.weights import GpuLayer
from krasis.runtime.planning.workspace import STREAM_ROWS

if TYPE_CHECKING:
    from krasis.runtime.gpu.model import GpuModel

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""out f32 [T, n] = x f32 [T, k] x weight [n, k]^T, arguments (x, weight, out)."""


class GpuGate:
    """The mean of all streams of rows, each channel weighed by a low-rank gate. prefix: of its weights."""

    def __init__(self, model: GpuModel, weights: GpuLayer, prefix: str) -> None:
        if model.spec.residual is None:
            raise NativeError("the model has one residual stream", where=prefix)
        self._kernels, self._spec = model.kernels, model.spec
        self._share = 1.0 / model.spec.residual.streams
        self._norm, self._down, self._up = (
            weights.plain(f"{prefix}.{part}") for part in ("norm", "down", "up")
        )
        self._inject = weights.optional(f"{prefix}.inject")

    def run(
        self, stream: Stream, product: Product, b: Buffers, rows: range, to: int, *, clears: bool = False
    ) -> None:
        """``normed`` and ``x`` from row ``to`` on = what a block reads of rows of ``streams``. Of gates that
        have such weights ``stream_logits``: how much of what it adds each stream takes. clears: hidden."""
        kernels, spec = self._kernels, self._spec
        for begin in range(rows.start, rows.stop, STREAM_ROWS):
            count = min(STREAM_ROWS, rows.stop - begin)
            at = slice(to + begin - rows.start, to + begin - rows.start + count)
            normed, gates, low = b.stream_normed[:count], b.stream_gates[:count], b.stream_low[:count]
            own = b.streams[begin : begin + count]
            kernels.stream_norm(stream, own, self._norm, spec.norm.eps, spec.hidden, normed)
            product(normed, self._down, low)
            kernels.stream_squash(stream, low, self._share)
            product(low, self._up, gates)
            if self._inject is not None:
                product(normed, self._inject, b.stream_logits[begin : begin + count])
            cleared = b.hidden[at] if clears else None
            kernels.stream_mix(stream, normed, gates, b.normed[at], b.x[at], cleared)


class GpuReadStreams:
    """Before a block: what it reads. part: attention or mlp."""

    def __init__(self, model: GpuModel, layer: int, part: str) -> None:
        self._gate = GpuGate(model, model.weights.layers[layer], f"{part}.residual")

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b = rows.own
        self._gate.run(rows.stream, rows.small_product, b, range(len(b.streams)), 0, clears=True)


class GpuWriteStreams:
    """Behind a block: each stream takes its part of what it added."""

    def __init__(self, model: GpuModel) -> None:
        self._kernels = model.kernels

    def run(self, rows: PassRows) -> None:
        """See ``Block``."""
        b = rows.own
        self._kernels.stream_add(rows.stream, b.streams, b.hidden, b.stream_logits)


def begin_streams(stream: Stream, b: Buffers) -> None:
    """Every stream begins as the embedding, which is in hidden."""
    if not b.streams.numel():
        return
    hidden, streams = b.hidden, b.streams.view(len(b.hidden), -1, b.hidden.shape[1])

    def action(_: int) -> None:
        streams.copy_(hidden[:, None])

    stream.launch("begin streams", action, reads=(hidden,), writes=(b.streams,))


class GpuEnd:
    """What the head reads: the last norm of the residual, or the mean of its streams."""

    def __init__(self, model: GpuModel) -> None:
        self._model = model
        self._gate = None
        if model.spec.residual is not None:
            self._gate = GpuGate(model, model.weights.end, "final_residual")

    def read(self, b: Buffers, rows: range, to: int = 0, product: Product | None = None) -> None:
        """``x`` from row ``to`` on, of rows of the residual. product: of a pass; without one prefill's."""
        model, stream = self._model, self._model.stream
        if self._gate is not None:
            self._gate.run(stream, product or partial(router_product, stream), b, rows, to)
            return
        hidden, x = b.hidden[rows.start : rows.stop], b.x[to : to + len(rows)]
        model.kernels.rms_norm(stream, hidden, model.weights.final_norm, model.spec.norm.eps, x)
