"""Rotary embedding tables: plain, linear and YaRN (https://arxiv.org/abs/2309.00071), as transformers
computes them."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from krasis.formats.architecture_record import Architecture, RopeScaling
from krasis.formats.errors import UnsupportedModelError

FloatArray = npt.NDArray[np.float32]

ROWS_AT_ONCE, THREADED_BLOCKS, MOST_THREADS = 4096, 4, 16


class RopeTables:
    """The tables of a context, of which only the rows that were needed are computed: those of a long context
    would take longer than opening a bundle.

    cos, sin: f32 [num_positions, head_dim/2]. The arrays stay the same; rows are valid as far as ``ensure``
    was asked for.
    """

    __slots__ = ("_architecture", "_num_valid", "cos", "sin")

    def __init__(self, architecture: Architecture, num_positions: int) -> None:
        shape = (num_positions, architecture.head_dim // 2)
        self._architecture, self._num_valid = architecture, 0
        # Fresh pages: they take no memory before they are written.
        self.cos: FloatArray = np.zeros(shape, np.float32)
        self.sin: FloatArray = np.zeros(shape, np.float32)
        self.ensure(min(1, num_positions))

    def ensure(self, num_positions: int) -> None:
        """Makes the rows of positions below num_positions valid, and some more with them."""
        if num_positions <= self._num_valid:
            return
        end = min(len(self.cos), -(-num_positions // ROWS_AT_ONCE) * ROWS_AT_ONCE)
        rows = slice(self._num_valid, end)
        self.cos[rows], self.sin[rows] = rope_tables(self._architecture, end, self._num_valid)
        self._num_valid = end


def rope_tables(
    architecture: Architecture, num_positions: int, first: int = 0
) -> tuple[FloatArray, FloatArray]:
    """(cos, sin) of positions from first to below num_positions, f32 [count, head_dim/2], YaRN's attention
    factor included.

    Angles are formed in f32, as transformers does: the model was trained with that rounding.
    """
    frequencies, factor = inverse_frequencies(
        architecture.head_dim, architecture.rope_theta, architecture.rope_scaling
    )
    scale = np.float32(factor)
    shape = (num_positions - first, len(frequencies))
    cos, sin = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def fill(begin: int) -> None:
        rows = slice(begin, begin + ROWS_AT_ONCE)
        end = min(num_positions, first + begin + ROWS_AT_ONCE)
        positions = np.arange(first + begin, end, dtype=np.float32)
        angles = (positions[:, None] * frequencies[None, :]).astype(np.float64)
        cos[rows], sin[rows] = np.cos(angles), np.sin(angles)
        cos[rows] *= scale
        sin[rows] *= scale

    blocks = range(0, shape[0], ROWS_AT_ONCE)
    if len(blocks) < THREADED_BLOCKS:
        for begin in blocks:
            fill(begin)
        return cos, sin
    # NumPy lets others run meanwhile: a quarter of a million positions take most of a second by one thread.
    with ThreadPoolExecutor(min(len(blocks), MOST_THREADS, len(os.sched_getaffinity(0)))) as executor:
        for _ in executor.map(fill, blocks):
            pass
    return cos, sin


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[FloatArray, float]:
    """(f32 [head_dim/2], factor on cos and sin). Raises UnsupportedModelError for an unknown kind."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = np.power(np.float32(theta), exponents, dtype=np.float32)
    plain = (np.float32(1.0) / periods).astype(np.float32)
    if scaling.kind == "none":
        return plain, 1.0
    if scaling.kind == "linear":
        return (plain / np.float32(scaling.factor)).astype(np.float32), 1.0
    if scaling.kind == "yarn":
        stretched = (np.float32(1.0) / (np.float32(scaling.factor) * periods)).astype(np.float32)
        keep = np.float32(1.0) - _yarn_ramp(head_dim, theta, scaling)
        mixed = stretched * (np.float32(1.0) - keep) + plain * keep
        return mixed.astype(np.float32), _yarn_attention_factor(scaling)
    raise UnsupportedModelError(
        "unknown scaling of the rotary embedding", got=scaling.kind, limit="none, linear, yarn"
    )


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> FloatArray:
    """f32 [head_dim/2]: 0 where a frequency turns often enough to be kept, 1 where it is stretched."""

    def dimension(rotations: float) -> float:
        turns = scaling.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    clipped: FloatArray = np.clip(ramp, 0.0, 1.0).astype(np.float32)
    return clipped


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1.0 else 0.1 * math.log(scaling.factor) + 1.0
