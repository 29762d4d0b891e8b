"""NumPy twins of the native compute functions: clear, slow, float32 in and out unless the input is float64.

Tests compare the kernels with these in float64; the engine's float32-activation path runs on them. Shapes as
in ``csrc/krasis.h``: T tokens, n outputs, k inputs. Every function follows the dtype of its first argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from krasis.formats.layouts.cpu_tiles import BLOCK_K
from krasis.runtime.cpu.native_arrays import Array

_QUERY_CHUNK = 64  # bounds the score matrix: [heads, chunk, keys]

ExpertWeights = Callable[[int], tuple[Array, Array, Array]]
# Called with an expert, what gate and up multiply [tokens, hidden], and what down multiplies [tokens, I].
ExpertObserver = Callable[[int, Array, Array], None]


@dataclass(frozen=True, slots=True)
class QuantizedActs:
    """``q`` int8 [T, k], ``scale`` float32 [T, k/32], ``sum`` int32 [T, k/32]."""

    q: Array
    scale: Array
    sum: Array

    def dequantized(self) -> Array:
        """float32 [T, k]."""
        return (self.q.reshape(*self.scale.shape, BLOCK_K) * self.scale[..., None]).reshape(self.q.shape)


def quantize(x: Array) -> QuantizedActs:
    """int8 per block of 32 of x [T, k]: scale = absmax/127, q = round half to even(x/scale), else 0."""
    blocks = x.reshape(len(x), x.shape[1] // BLOCK_K, BLOCK_K)
    scale = np.abs(blocks).max(axis=-1) / np.asarray(127, x.dtype)
    safe = np.where(scale == 0, np.asarray(1, x.dtype), scale)
    q = np.clip(np.rint(np.where(scale[..., None] == 0, 0, blocks / safe[..., None])), -127, 127).astype(
        np.int8
    )
    return QuantizedActs(q.reshape(x.shape), scale.astype(np.float32), q.sum(axis=-1, dtype=np.int32))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    mean = np.mean(x * x, axis=-1, keepdims=True)
    normed: Array = x / np.sqrt(mean + np.asarray(eps, x.dtype)) * weight.astype(x.dtype)
    return normed


def gemm(x: Array, weight: Array) -> Array:
    """[T, n] = x [T, k] x weight [n, k]^T."""
    product: Array = x @ weight.astype(x.dtype).T
    return product


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding, rotate-half form: x [T, heads, D]; cos, sin [T, D/2] of the tokens' positions."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    c, s = cos[:, None, :].astype(x.dtype), sin[:, None, :].astype(x.dtype)
    return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1)


def qk_norm_rope(
    qkv: Array,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Array | None,
    k_norm: Array | None,
    eps: float,
    cos: Array,
    sin: Array,
) -> tuple[Array, Array, Array]:
    """(q [T, num_heads, D], k, v [T, num_kv_heads, D]) of qkv; cos, sin [T, D/2]; norms [D]."""
    num_all = num_heads + 2 * num_kv_heads
    heads = qkv.reshape(len(qkv), num_all, qkv.shape[1] // num_all)
    q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    return rope(q, cos, sin), rope(k, cos, sin), heads[:, num_heads + num_kv_heads :]


def softmax(x: Array) -> Array:
    """Over the last dimension."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: Array = e / e.sum(axis=-1, keepdims=True)
    return shares


def attention(q: Array, k_cache: Array, v_cache: Array, start: int, scale: float) -> Array:
    """Causal grouped-query attention: q [T, heads, D] at positions start.., caches [kv_heads, capacity, D].

    Returns [T, heads, D].
    """
    tokens, num_heads, dim = q.shape
    num_kv_heads = len(k_cache)
    group = num_heads // num_kv_heads
    out = np.empty_like(q)
    for first in range(0, tokens, _QUERY_CHUNK):
        last = min(first + _QUERY_CHUNK, tokens)
        num_keys = start + last
        keys = k_cache[:, :num_keys].astype(q.dtype)
        values = v_cache[:, :num_keys].astype(q.dtype)
        # [kv_heads, chunk * group, D]: the heads of a group share keys
        rows = q[first:last].reshape(last - first, num_kv_heads, group, dim).transpose(1, 0, 2, 3)
        scores = rows.reshape(num_kv_heads, -1, dim) @ keys.transpose(0, 2, 1) * np.asarray(scale, q.dtype)
        positions = np.repeat(np.arange(start + first, start + last), group)
        scores[:, np.arange(num_keys)[None, :] > positions[:, None]] = -np.inf
        mixed = (softmax(scores) @ values).reshape(num_kv_heads, last - first, group, dim)
        out[first:last] = mixed.transpose(1, 0, 2, 3).reshape(last - first, num_heads, dim)
    return out


def route_topk(logits: Array, top_k: int, normalize: bool) -> tuple[Array, Array]:
    """(ids int32, weights) [T, top_k]: the largest of softmax(logits), largest first, ties by lower id."""
    probabilities = softmax(logits)
    ids = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(probabilities, ids, axis=-1)
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids.astype(np.int32), weights


def silu(x: Array) -> Array:
    """x / (1 + e^-x), without overflow for any x."""
    e = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def moe(
    x: Array, ids: Array, weights: Array, experts: ExpertWeights, observe: ExpertObserver | None = None
) -> Array:
    """sum_j weights[t, j] * down_e(silu(gate_e x_t) * up_e x_t), e = ids[t, j]; an id of -1 is skipped.

    x [T, hidden]; ids, weights [T, top_k]; experts(e) gives gate, up [I, hidden] and down [hidden, I]. Terms
    are added in the order of j, whatever order the experts are taken in. observe: called once for every
    expert that has tokens, in ascending order. Returns [T, hidden].
    """
    terms = np.zeros((*ids.shape, x.shape[1]), dtype=x.dtype)
    for expert in np.unique(ids[ids >= 0]):
        tokens, slots = np.nonzero(ids == expert)
        gate, up, down = experts(int(expert))
        rows = x[tokens]
        middle = silu(gemm(rows, gate)) * gemm(rows, up)
        if observe is not None:
            observe(int(expert), rows, middle)
        terms[tokens, slots] = gemm(middle, down)
    out = np.zeros_like(x)
    for slot in range(ids.shape[1]):
        out += weights[:, slot, None].astype(x.dtype) * terms[:, slot]
    return out
