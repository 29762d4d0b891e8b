"""Residual streams that small matrices mix (hyper-connections, mHC) on the CPU: what stands around the
blocks, and how the streams become one at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.models.spec import ModelSpec, Residual
from krasis.runtime.cpu.blocks import Block, CpuContext, Rows
from krasis.runtime.cpu.buffers import Buffers
from krasis.runtime.cpu.hyper_kernels import hyper_add, hyper_sum, hyper_weights
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.weights import LayerWeights, Weight

FloatArray = npt.NDArray[np.float32]


class HyperWeights:
    """How the streams of rows become what a block reads, and what they take of its output and of each other.
    prefix: of the weights. pre_only: at the end, where they become one.
    """

    def __init__(
        self,
        spec: ModelSpec,
        buffers: Buffers,
        weights: Mapping[str, Weight],
        prefix: str,
        *,
        pre_only: bool = False,
    ) -> None:
        residual = residual_of(spec, prefix)
        self._spec, self._buffers, self._residual = spec, buffers, residual
        self._fn, self._base, self._scale = (_vector(weights, prefix, x) for x in ("fn", "base", "scale"))
        self._rounds = 0 if pre_only else residual.rounds
        self._name = "hyper_end" if pre_only else "hyper_mixes"
        buffers.reserve(self._name, len(self._base))
        buffers.reserve("mixed", spec.hidden)

    def run(self, kernels: Kernels, hidden: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The weighed sum of the streams of hidden [T, streams * hidden], [T, hidden], and all weights."""
        spec, num = self._spec, len(hidden)
        mixes = self._buffers.rows(self._name, num, len(self._base))
        mixed = self._buffers.rows("mixed", num, spec.hidden)
        kernels.gemm_float(hidden, self._fn, mixes)
        hyper_weights(
            kernels,
            hidden,
            mixes,
            spec.hidden,
            self._scale,
            self._base,
            norm_eps=spec.norm.eps,
            eps=self._residual.eps,
            rounds=self._rounds,
        )
        hyper_sum(kernels, hidden, mixes, mixed)
        return mixed, mixes


class CpuHyper:
    """A block between streams: it reads the norm of their weighed sum; each stream then is a sum of all and
    of its share of what the block adds.
    """

    def __init__(self, context: CpuContext, block: Block, weights: LayerWeights, part: str) -> None:
        self._context, self._block = context, block
        self._weights = HyperWeights(context.spec, context.buffers, weights.tensors, f"{part}.residual")
        self._zeros = np.zeros(context.spec.hidden, np.float32)
        context.buffers.reserve("block_added", context.spec.hidden)

    def run(self, kernels: Kernels, rows: Rows) -> None:
        """See ``blocks.Block``."""
        spec = self._context.spec
        mixed, weights = self._weights.run(kernels, rows.hidden)
        added = self._context.buffers.rows("block_added", rows.num, spec.hidden)
        kernels.rms_norm(mixed, self._zeros, spec.norm.eps, added)  # zeros, to which the block adds
        self._block.run(kernels, replace(rows, hidden=added, mixed=mixed))
        hyper_add(kernels, rows.hidden, added, weights)


class HyperEnd:
    """How the streams become one before the last norm: their mean, or a sum by weights of its own."""

    def __init__(self, spec: ModelSpec, buffers: Buffers, weights: Mapping[str, Weight]) -> None:
        residual = residual_of(spec, "final_residual")
        self._spec, self._buffers = spec, buffers
        self._own: HyperWeights | None = None
        if residual.end == "head":
            self._own = HyperWeights(spec, buffers, weights, "final_residual", pre_only=True)
        self._shares = np.full((1, residual.streams), 1 / residual.streams, np.float32)
        buffers.reserve("mixed", spec.hidden)

    def run(self, kernels: Kernels, hidden: FloatArray) -> FloatArray:
        """[T, hidden] of hidden [T, streams * hidden]."""
        if self._own is not None:
            return self._own.run(kernels, hidden)[0]
        mixed = self._buffers.rows("mixed", len(hidden), self._spec.hidden)
        hyper_sum(kernels, hidden, self._shares, mixed)
        return mixed


def residual_of(spec: ModelSpec, where: str) -> Residual:
    """How the model's streams are mixed. Raises NativeError for a model with one stream."""
    if spec.residual is None:
        raise NativeError("the model has one residual stream", where=where)
    return spec.residual


def _vector(weights: Mapping[str, Weight], prefix: str, part: str) -> FloatArray:
    found = weights.get(f"{prefix}.{part}")
    if not isinstance(found, np.ndarray):
        raise NativeError("the model has no such weight", where=f"{prefix}.{part}")
    return found
