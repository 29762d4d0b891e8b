"""Mamba-2 in NumPy, token by token: what the kernels are measured against, and the float32 path's block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.formats.models.recurrent import Mamba2
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.weights import LayerWeights, to_float32
from krasis.runtime.state.hybrid_store import HybridStore

if TYPE_CHECKING:
    from krasis.runtime.cpu.float_blocks import FloatContext

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class MambaVectors:
    """conv: [channels, conv_width], the newest token's weights last; conv_bias: [channels] or None. a_log,
    dt_bias, skip: [heads]. gate_norm: [heads * head_dim], with its eps.
    """

    conv: Array
    conv_bias: Array | None
    a_log: Array
    dt_bias: Array
    skip: Array
    gate_norm: Array
    eps: float


class FloatMamba2:
    """output(scan(norm(hidden)))."""

    def __init__(self, context: FloatContext, index: int, mixer: Mamba2, weights: LayerWeights) -> None:
        if not isinstance(context.store, HybridStore):
            raise NativeError("the state has no place for this layer", where="Mamba-2", got=index)
        self._context, self._index, self._mixer, self._weights = context, index, mixer, weights
        self._store = context.store

    def run(self, hidden: Array, spans: tuple[Span, ...]) -> Array:
        """What the block adds to hidden [T, hidden]."""
        context, mixer, weights = self._context, self._mixer, self._weights
        normed = context.norm(hidden, weights.vector("attention.norm"))
        rows = mixer.inner + mixer.conv_channels
        projected = reference.gemm(normed, context.dense(self._index, weights, "mamba.input")[:rows])
        dt = weights.matrix("mamba.dt")
        steps = reference.gemm(normed, to_float32(dt.data, dt.dtype))
        vectors = MambaVectors(
            conv=weights.vector("mamba.conv"),
            conv_bias=weights.optional_vector("mamba.conv.bias"),
            a_log=weights.vector("mamba.a_log"),
            dt_bias=weights.vector("mamba.dt_bias"),
            skip=weights.vector("mamba.d"),
            gate_norm=weights.vector("mamba.gate_norm"),
            eps=context.spec.norm.eps,
        )
        mixed = [
            mamba2(
                projected[s.first_row : s.end_row],
                steps[s.first_row : s.end_row],
                mixer,
                vectors,
                *self._store.fixed(s.slot, self._index),
                is_first=s.start == 0,
            )
            for s in spans
        ]
        output = context.dense(self._index, weights, "mamba.output")[: context.spec.hidden]
        return reference.gemm(np.concatenate(mixed), output)


def mamba2(
    projected: Array,
    steps: Array,
    mixer: Mamba2,
    vectors: MambaVectors,
    matrices: Array,
    columns: Array,
    *,
    is_first: bool,
) -> Array:
    """[T, heads * head_dim] of one sequence's rows: projected [T, z x B C], steps [T, heads].

    matrices [heads, tiles, state_dim, columns], columns [conv_width - 1, channels]: the state before the
    rows, which becomes that after them; is_first: it is zero, whatever is there.
    """
    if is_first:
        matrices[...], columns[...] = 0, 0
    inner, rows, kind = mixer.inner, len(projected), projected.dtype
    mixed = _convolved(projected[:, inner:], vectors, columns)
    share, size = mixer.heads // mixer.groups, mixer.state_dim
    x = mixed[:, :inner].reshape(rows, mixer.heads, mixer.head_dim)
    b, c = (
        np.repeat(part.reshape(rows, mixer.groups, size), share, axis=1)
        for part in np.split(mixed[:, inner:], 2, axis=1)
    )
    taken = np.logaddexp(np.asarray(0, kind), steps + vectors.dt_bias.astype(kind))
    taken = np.maximum(taken, np.asarray(mixer.min_step, kind))
    decays = np.exp(-np.exp(vectors.a_log.astype(kind)) * taken)
    heads, tiles, _, width = matrices.shape
    state = matrices.transpose(0, 2, 1, 3).reshape(heads, size, tiles * width).copy()
    out = np.empty_like(x)
    for t in range(rows):
        state *= decays[t, :, None, None]
        state += b[t, :, :, None] * (taken[t, :, None] * x[t])[:, None, :]
        out[t] = np.einsum("hnp,hn->hp", state, c[t]) + vectors.skip.astype(kind)[:, None] * x[t]
    matrices[...] = state.reshape(heads, size, tiles, width).transpose(0, 2, 1, 3)
    gated = out.reshape(rows, inner) * reference.silu(projected[:, :inner])
    groups = gated.reshape(rows, mixer.groups, -1)
    ones = np.ones(groups.shape[-1], kind)
    normed: Array = reference.rms_norm(groups, ones, vectors.eps).reshape(rows, inner)
    weighted: Array = normed * vectors.gate_norm.astype(kind)
    return weighted


def _convolved(x: Array, vectors: MambaVectors, columns: Array) -> Array:
    """silu of a causal depthwise convolution of x [T, channels] with a bias; columns: the tokens before, the
    oldest first, which become the last ones."""
    before = len(columns)
    whole = np.concatenate([columns.astype(x.dtype), x])
    taps = vectors.conv.astype(x.dtype)
    total = sum(whole[tap : tap + len(x)] * taps[:, tap] for tap in range(before + 1))
    columns[...] = whole[len(whole) - before :]
    if vectors.conv_bias is not None:
        total = total + vectors.conv_bias.astype(x.dtype)
    return reference.silu(np.asarray(total))
