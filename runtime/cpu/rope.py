"""Rotary embedding tables: plain, linear, YaRN (https://arxiv.org/abs/2309.00071) and Llama 3's, as
transformers computes them."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.rope import Rope, RopeScaling
from krasis.formats.models.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]

ROWS_AT_ONCE, THREADED_BLOCKS, MOST_THREADS = 4096, 4, 16


class RopeTables:
    """The tables of a context, of which only the rows that were needed are computed: those of a long context
    would take longer than opening a bundle.

    cos, sin: f32 [num_positions, dims/2], dims as ``rotated_dims`` says. The arrays stay the same; rows are
    valid as far as ``ensure`` was asked for.
    """

    __slots__ = ("_head_dim", "_num_valid", "_rope", "cos", "sin")

    def __init__(self, rope: Rope, num_positions: int, head_dim: int | None = None) -> None:
        shape = (num_positions, rotated_dims(rope, head_dim) // 2)
        self._rope, self._head_dim, self._num_valid = rope, head_dim, 0
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
        self.cos[rows], self.sin[rows] = rope_tables(self._rope, end, self._num_valid, self._head_dim)
        self._num_valid = end


def tables_of(spec: ModelSpec, num_positions: int) -> dict[Rope, RopeTables]:
    """Tables for each rotation that the model's layers have."""
    kinds = Attention | LatentAttention | CompressedAttention
    rotating = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, kinds)]
    widths = {
        mixer.rope: mixer.rope_dim if isinstance(mixer, LatentAttention) else mixer.head_dim
        for mixer in rotating
    }
    widths = {index.rope: index.dim for mixer in rotating if (index := mixer.selection) is not None} | widths
    made: dict[tuple[Rope, int], RopeTables] = {}  # an index may turn other pairs by the same angles
    tables = {}
    for rope, width in widths.items():
        if rope is not None:
            key = replace(rope, style="half"), rotated_dims(rope, width)
            tables[rope] = made.setdefault(key, RopeTables(rope, num_positions, width))
    return tables


def rope_of(spec: ModelSpec) -> Rope:
    """The rotation of a model all of whose attention layers rotate alike. Raises UnsupportedModelError for
    others."""
    ropes = {layer.mixer.rope for layer in spec.layers if isinstance(layer.mixer, Attention)}
    rope = ropes.pop() if len(ropes) == 1 else None
    if rope is None:
        raise UnsupportedModelError("layers rotate their heads in different ways, or not at all")
    return rope


def rotated_dims(rope: Rope, head_dim: int | None = None) -> int:
    """Channels whose pairs have a place in the tables: all of a head where those beyond stand still, but are
    paired with others (``proportional``).
    """
    return head_dim if rope.scaling.kind == "proportional" and head_dim is not None else rope.dims


def rope_tables(
    rope: Rope, num_positions: int, first: int = 0, head_dim: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """(cos, sin) of positions from first to below num_positions, f32 [count, dims/2], YaRN's attention
    factor included. head_dim: see ``rotated_dims``.

    Angles are formed in f32, as transformers does: the model was trained with that rounding.
    """
    dims = rotated_dims(rope, head_dim)
    stands_still = rope.scaling.kind == "proportional"
    scaling = RopeScaling("linear", rope.scaling.factor) if stands_still else rope.scaling
    frequencies, factor = inverse_frequencies(dims, rope.theta, scaling)
    if stands_still:
        frequencies[rope.dims // 2 :] = 0.0
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


def inverse_frequencies(dims: int, theta: float, scaling: RopeScaling) -> tuple[FloatArray, float]:
    """(f32 [dims/2], factor on cos and sin). Raises UnsupportedModelError for an unknown kind."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    # In float64, rounded once: powers in float32 are off by as much as the machine's library likes, and an
    # angle by that times its position.
    periods = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    plain = (np.float32(1.0) / periods).astype(np.float32)
    if scaling.kind == "none":
        return plain, 1.0
    if scaling.kind == "linear":
        return (plain / np.float32(scaling.factor)).astype(np.float32), 1.0
    if scaling.kind == "yarn":
        stretched = (np.float32(1.0) / (np.float32(scaling.factor) * periods)).astype(np.float32)
        keep = np.float32(1.0) - _yarn_ramp(dims, theta, scaling)
        mixed = stretched * (np.float32(1.0) - keep) + plain * keep
        return mixed.astype(np.float32), _yarn_attention_factor(scaling)
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    raise UnsupportedModelError(
        "unknown scaling of the rotary embedding", got=scaling.kind, limit="none, linear, yarn, llama3"
    )


def _llama3(plain: FloatArray, scaling: RopeScaling) -> FloatArray:
    """f32 [dims/2]: slow frequencies are stretched, fast ones kept, and those between blended by how many
    turns they make in the original context."""
    turns = np.float32(scaling.original_max_positions) * plain / np.float32(2 * math.pi)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    keep = np.clip((turns - low) / (high - low), np.float32(0.0), np.float32(1.0))
    blended: FloatArray = ((1 - keep) * plain / np.float32(scaling.factor) + keep * plain).astype(np.float32)
    return blended


def _yarn_ramp(dims: int, theta: float, scaling: RopeScaling) -> FloatArray:
    """f32 [dims/2]: 0 where a frequency turns often enough to be kept, 1 where it is stretched."""

    def dimension(rotations: float) -> float:
        turns = scaling.original_max_positions / (rotations * 2 * math.pi)
        return dims * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    clipped: FloatArray = np.clip(ramp, 0.0, 1.0).astype(np.float32)
    return clipped


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1.0 else 0.1 * math.log(scaling.factor) + 1.0
