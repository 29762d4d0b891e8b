"""Residual streams on the CPU: the gated ones that stand around the blocks, and what the head reads at the
end. ``hyper`` has those that small matrices mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.blocks import Block, CpuContext, Rows, cpu_block
from krasis.runtime.cpu.buffers import Buffers
from krasis.runtime.cpu.hashed_table import HashedTables
from krasis.runtime.cpu.hyper import CpuHyper, HyperEnd
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.stream_kernels import stream_add, stream_mix, stream_norm, stream_squash
from krasis.runtime.cpu.weights import FloatWeight, LayerWeights, ModelWeights, Weight

FloatArray = npt.NDArray[np.float32]


class CpuGate:
    """The mean of all streams of rows, each channel weighed by a low-rank gate. prefix: of its weights."""

    def __init__(self, spec: ModelSpec, buffers: Buffers, weights: Mapping[str, Weight], prefix: str) -> None:
        residual = spec.residual
        if residual is None:
            raise NativeError("the model has one residual stream", where=prefix)
        self._spec, self._buffers = spec, buffers
        self._streams, self._rank, self._width = residual.streams, residual.rank, spec.residual_width
        self._norm = _matrix(weights, f"{prefix}.norm")
        self._down, self._up = (_matrix(weights, f"{prefix}.{part}") for part in ("down", "up"))
        self._inject = _matrix(weights, f"{prefix}.inject") if f"{prefix}.inject" in weights else None
        for name in ("streams_normed", "streams_gates"):
            buffers.reserve(name, self._width)
        buffers.reserve("streams_low", self._rank)
        buffers.reserve("mixed", spec.hidden)
        buffers.reserve("inject", self._streams)

    def run(self, kernels: Kernels, hidden: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What a block reads of hidden [T, streams * hidden], [T, hidden], and how much of what it adds each
        stream takes, [T, streams], before a sigmoid.
        """
        num, buffers = len(hidden), self._buffers
        normed = buffers.rows("streams_normed", num, self._width)
        gates = buffers.rows("streams_gates", num, self._width)
        low, mixed = (
            buffers.rows("streams_low", num, self._rank),
            buffers.rows("mixed", num, self._spec.hidden),
        )
        inject = buffers.rows("inject", num, self._streams)
        stream_norm(kernels, hidden, self._norm, self._spec.norm.eps, self._spec.hidden, normed)
        kernels.gemm_float(normed, self._down, low)
        stream_squash(kernels, low, 1.0 / self._streams)
        kernels.gemm_float(low, self._up, gates)
        stream_mix(kernels, normed, gates, mixed)
        if self._inject is not None:
            kernels.gemm_float(normed, self._inject, inject)
        return mixed, inject


class CpuStreams:
    """A block between streams: it reads their mean and adds to each as much as that takes."""

    def __init__(self, context: CpuContext, block: Block, weights: LayerWeights, part: str) -> None:
        self._context, self._block = context, block
        self._gate = CpuGate(context.spec, context.buffers, weights.tensors, f"{part}.residual")
        self._zeros = np.zeros(context.spec.hidden, np.float32)
        context.buffers.reserve("block_added", context.spec.hidden)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``Block``."""
        spec = self._context.spec
        mixed, inject = self._gate.run(kernels, rows.hidden)
        added = self._context.buffers.rows("block_added", rows.num, spec.hidden)
        kernels.rms_norm(mixed, self._zeros, spec.norm.eps, added)  # zeros, to which the block adds
        self._block.run(kernels, replace(rows, hidden=added, mixed=mixed))
        stream_add(kernels, rows.hidden, added, inject)


class CpuEnd:
    """What the head reads: the last norm of the residual, or of what its streams become, or gated streams'
    mean."""

    def __init__(self, weights: ModelWeights, buffers: Buffers) -> None:
        self._norm, self._spec = weights.final_norm, weights.spec
        self._gate: CpuGate | None = None
        self._hyper: HyperEnd | None = None
        residual = weights.spec.residual
        if residual is not None and residual.kind == "hyper":
            self._hyper = HyperEnd(weights.spec, buffers, weights.end)
        elif residual is not None:
            self._gate = CpuGate(weights.spec, buffers, weights.end, "final_residual")

    def read(self, kernels: Kernels, hidden: Array, acts: Acts) -> None:
        """acts [T, hidden] of rows of the residual."""
        if self._gate is not None:
            kernels.quantize(self._gate.run(kernels, hidden)[0], acts)
            return
        one = hidden if self._hyper is None else self._hyper.run(kernels, hidden)
        kernels.rms_norm(one, self._norm, self._spec.norm.eps, acts=acts)


def cpu_layer(context: CpuContext, tables: HashedTables, index: int, weights: LayerWeights) -> list[Block]:
    """What adds to the residual in a layer, in order."""
    layer, found = weights.layer, list[Block]()
    if layer.ngram:
        from krasis.runtime.cpu.hashed_block import CpuHashedTable  # and NumPy twins, which few models need

        found.append(CpuHashedTable(context, tables, index, weights))
    for part, name in ((layer.mixer, "attention"), (layer.mlp, "mlp")):
        if part is None:
            continue
        block, residual = cpu_block(context, index, part, weights), context.spec.residual
        if residual is not None:
            around = CpuStreams if residual.kind == "gated" else CpuHyper
            block = around(context, block, weights, name)
        found.append(block)
    return found


def _matrix(weights: Mapping[str, Weight], name: str) -> Array:
    """A weight that is not packed, as the kernels take it."""
    found = weights.get(name)
    if isinstance(found, FloatWeight):
        return found.data
    if not isinstance(found, np.ndarray):
        raise NativeError("the model has no such weight", where=name)
    return found
