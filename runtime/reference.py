"""NumPy twins of the native compute functions: clear, slow, float32 in and out unless the input is float64.

Tests compare the kernels with these in float64; the engine's float32-activation path runs on them. Shapes as
in ``csrc/krasis.h``: T tokens, n outputs, k inputs. Every function follows the dtype of its first argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.layouts.cpu_tiles import BLOCK_K
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Activation, Router, Score
from krasis.formats.models.rope import QueryTemperature, Rope

Array = npt.NDArray[Any]

SILU = Activation()
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


def rotate(x: Array, cos: Array, sin: Array, rope: Rope) -> Array:
    """Rotary embedding of the first channels, as many as the tables have: x [T, heads, D]; cos, sin
    [T, dims/2] of the tokens' positions.
    """
    c, s = cos[:, None, :].astype(x.dtype), sin[:, None, :].astype(x.dtype)
    dims = 2 * cos.shape[-1]
    turned = x[..., :dims]
    if rope.style == "interleaved":
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
        pairs = np.stack([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1)
        return np.concatenate([pairs.reshape(turned.shape), x[..., dims:]], axis=-1)
    half = dims // 2
    x1, x2 = turned[..., :half], turned[..., half:]
    return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s, x[..., dims:]], axis=-1)


def temperatures(temperature: QueryTemperature, start: int, end: int) -> Array:
    """float32 [end - start]: what queries at these positions are multiplied by."""
    periods = (np.arange(start, end) + temperature.shift) // temperature.period
    return (1 + temperature.scale * np.log1p(periods.astype(np.float64))).astype(np.float32)


@dataclass(frozen=True, slots=True)
class QkvVectors:
    """What is added to and multiplied with projected q, k and v. bias: [all rows]. q_norm, k_norm:
    [head_dim], or of all heads for flat norms."""

    bias: Array | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None


def projected_heads(
    qkv: Array, mixer: Attention, vectors: QkvVectors, eps: float
) -> tuple[Array, Array, Array]:
    """(q [T, heads, D], k, v [T, kv_heads, D]) of qkv [T, rows]: bias, norms before the rotation, clip."""
    if vectors.bias is not None:
        qkv = qkv + vectors.bias.astype(qkv.dtype)
    rows, dim = len(qkv), mixer.head_dim
    q, k, v = np.split(qkv, [mixer.query_rows, mixer.query_rows + mixer.key_rows], axis=1)
    v = k if mixer.shared_kv else v
    if mixer.qk_norm == "flat":
        q, k = _normed(q, vectors.q_norm, eps), _normed(k, vectors.k_norm, eps)
    q, k = q.reshape(rows, mixer.heads, dim), k.reshape(rows, mixer.kv_heads, dim)
    if mixer.qk_norm == "head":
        q, k = normed_heads(q, k, vectors, eps)
    v = v.reshape(rows, mixer.kv_heads, dim)
    if mixer.value_norm:
        v = rms_norm(v, np.ones(dim, v.dtype), eps)
    if mixer.clip is not None:
        q, k, v = (np.clip(x, -mixer.clip, mixer.clip) for x in (q, k, v))
    return q, k, v


def normed_heads(q: Array, k: Array, vectors: QkvVectors, eps: float) -> tuple[Array, Array]:
    """Each head of q and k [T, heads, D] after its norm, if there is one."""
    return _normed(q, vectors.q_norm, eps), _normed(k, vectors.k_norm, eps)


def _normed(x: Array, weight: Array | None, eps: float) -> Array:
    return x if weight is None else rms_norm(x, weight, eps)


def softmax(x: Array) -> Array:
    """Over the last dimension."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: Array = e / e.sum(axis=-1, keepdims=True)
    return shares


def attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    start: int,
    scale: float,
    window: int | None = None,
    sinks: Array | None = None,
    chosen: Array | None = None,
) -> Array:
    """Causal grouped-query attention: q [T, heads, D] at positions start.., caches [kv_heads, capacity, D].

    window: keys j with 0 <= i - j < window are seen. sinks: [heads], one more logit in each softmax. chosen:
    bool [T, keys], those that are seen at all. Values may be of another width than keys. Returns [T, heads,
    width of a value].
    """
    tokens, num_heads, dim = q.shape
    num_kv_heads, width = len(k_cache), v_cache.shape[2]
    group = num_heads // num_kv_heads
    out = np.empty((tokens, num_heads, width), q.dtype)
    for first in range(0, tokens, _QUERY_CHUNK):
        last = min(first + _QUERY_CHUNK, tokens)
        num_keys = start + last
        keys = k_cache[:, :num_keys].astype(q.dtype)
        values = v_cache[:, :num_keys].astype(q.dtype)
        # [kv_heads, chunk * group, D]: the heads of a group share keys
        rows = q[first:last].reshape(last - first, num_kv_heads, group, dim).transpose(1, 0, 2, 3)
        scores = rows.reshape(num_kv_heads, -1, dim) @ keys.transpose(0, 2, 1) * np.asarray(scale, q.dtype)
        positions = np.repeat(np.arange(start + first, start + last), group)
        away = positions[:, None] - np.arange(num_keys)[None, :]
        scores[:, (away < 0) if window is None else ((away < 0) | (away >= window))] = -np.inf
        if chosen is not None:
            scores[:, ~np.repeat(chosen[first:last, :num_keys], group, axis=0)] = -np.inf
        if sinks is None:
            shares = softmax(scores)
        else:
            by_row = np.tile(sinks.astype(q.dtype).reshape(num_kv_heads, group), (1, last - first))[..., None]
            shares = softmax(np.concatenate([scores, by_row], axis=-1))[..., :-1]
        mixed = (shares @ values).reshape(num_kv_heads, last - first, group, width)
        out[first:last] = mixed.transpose(1, 0, 2, 3).reshape(last - first, num_heads, width)
    return out


@dataclass(frozen=True, slots=True)
class RouterVectors:
    """What a router adds to logits and scores and multiplies weights with, each [experts] or None."""

    bias: Array | None = None
    correction: Array | None = None
    expert_scale: Array | None = None


def route(logits: Array, router: Router, vectors: RouterVectors | None = None) -> tuple[Array, Array]:
    """(ids int32, weights) [T, top_k] of logits [T, experts], as ``mlps.Router`` says; largest first, ties by
    lower id.
    """
    vectors = vectors or RouterVectors()
    if vectors.bias is not None:
        logits = logits + vectors.bias.astype(logits.dtype)
    if router.logit_cap is not None:
        cap = np.asarray(router.logit_cap, logits.dtype)
        logits = cap * np.tanh(logits / cap)
    scores = _scores(logits, router.score)
    chosen_by = scores if vectors.correction is None else scores + vectors.correction.astype(logits.dtype)
    if router.groups > 1:
        chosen_by = np.where(_in_best_groups(chosen_by, router), chosen_by, -np.inf)
    ids = np.argsort(-chosen_by, axis=-1, kind="stable")[:, : router.top_k]
    return ids.astype(np.int32), _shares(scores, ids, router, vectors)


def route_by_token(logits: Array, router: Router, ids: Array) -> Array:
    """Weights [T, top_k] of the experts ids [T, top_k] that tokens have by a table, as ``route`` has them."""
    return _shares(_scores(logits, router.score), ids, router, RouterVectors())


def _shares(scores: Array, ids: Array, router: Router, vectors: RouterVectors) -> Array:
    """Weights [T, top_k] of chosen experts by the scores [T, experts]."""
    weights = np.take_along_axis(scores, ids, axis=-1)
    if router.score == "softmax_of_top":
        weights = softmax(weights)
    elif router.score == "sigmoid_of_top":
        weights = sigmoid(weights)
    if router.renormalise and router.score != "softmax_of_top":
        total = weights.sum(axis=-1, keepdims=True)
        floor, epsilon = (np.asarray(x, scores.dtype) for x in (router.sum_floor, router.sum_epsilon))
        weights = weights / (np.maximum(total, floor) + epsilon)
    if router.scale != 1.0:
        weights = weights * np.asarray(router.scale, scores.dtype)
    if vectors.expert_scale is not None:
        weights = weights * vectors.expert_scale.astype(scores.dtype)[ids]
    return weights


def _scores(logits: Array, score: Score) -> Array:
    if score == "softmax":
        return softmax(logits)
    if score == "sigmoid":
        return sigmoid(logits)
    if score == "sqrt_softplus":
        root: Array = np.sqrt(np.logaddexp(np.asarray(0, logits.dtype), logits))
        return root
    return logits


def _in_best_groups(scores: Array, router: Router) -> Array:
    """bool [T, experts]: whether the expert's group is among the best."""
    grouped = scores.reshape(len(scores), router.groups, -1)
    best = 2 if router.group_score == "best_two" else 1
    value = np.sort(grouped, axis=-1)[..., -best:].sum(axis=-1)
    kept = np.argsort(-value, axis=-1, kind="stable")[:, : router.top_groups]
    mask = np.zeros(value.shape, dtype=bool)
    np.put_along_axis(mask, kept, values=True, axis=1)
    return np.repeat(mask, grouped.shape[-1], axis=1)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), without overflow for any x."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def activate(x: Array, activation: Activation) -> Array:
    """What stands between up and down, [T, I] of x [T, 2 I]: gate, then up; without a gate of x [T, I]."""
    if activation.kind == "relu_squared":
        return np.square(np.maximum(x, 0))
    gate, up = np.split(x, 2, axis=-1)
    return gated(gate, up, activation)


def gated(gate: Array, up: Array, activation: Activation) -> Array:
    """``mlps.Activation`` of gate and up, each [T, I]."""
    limit, alpha = (np.asarray(value, gate.dtype) for value in (activation.limit, activation.alpha))
    kind = activation.kind
    out: Array
    if kind == "relu_squared":  # without a gate, which has no columns
        out = np.square(np.maximum(up, 0))
    elif kind == "silu":
        out = silu(gate) * up
    elif kind == "gelu_tanh":
        inner = np.asarray(np.sqrt(2 / np.pi), gate.dtype) * (
            gate + np.asarray(0.044715, gate.dtype) * gate**3
        )
        out = np.asarray(0.5, gate.dtype) * gate * (1 + np.tanh(inner)) * up
    elif kind == "swiglu_offset":
        low = np.minimum(gate, limit)
        out = low * sigmoid(alpha * low) * (np.clip(up, -limit, limit) + 1)
    elif kind == "silu_clamped_before":
        out = silu(np.minimum(gate, limit)) * np.clip(up, -limit, limit)
    elif kind == "silu_clamped_after":
        out = np.minimum(silu(gate), limit) * np.clip(up, -limit, limit)
    elif kind == "situ":
        out = alpha * np.tanh(gate / alpha) * sigmoid(gate) * limit * np.tanh(up / limit)
    else:
        raise UnsupportedModelError("unknown activation", got=kind)
    return out


def silu(x: Array) -> Array:
    """x / (1 + e^-x), without overflow for any x."""
    e = np.exp(-np.abs(x))
    return x * np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def moe(
    x: Array,
    ids: Array,
    weights: Array,
    experts: ExpertWeights,
    observe: ExpertObserver | None = None,
    activation: Activation = SILU,
    biases: tuple[Array, Array, Array] | None = None,
) -> Array:
    """sum_j weights[t, j] * down_e(activation(gate_e x_t, up_e x_t)), e = ids[t, j]; an id of -1 is skipped.

    x [T, hidden]; ids, weights [T, top_k]; experts(e) gives gate, up [I, hidden] and down [hidden, I]. Terms
    are added in the order of j, whatever order the experts are taken in. observe: called once for every
    expert that has tokens, in ascending order. biases: of gate, up [experts, I] and down [experts, hidden],
    added to their products. Returns [T, hidden].
    """
    terms = np.zeros((*ids.shape, x.shape[1]), dtype=x.dtype)
    for expert in np.unique(ids[ids >= 0]):
        tokens, slots = np.nonzero(ids == expert)
        gate, up, down = experts(int(expert))
        rows = x[tokens]
        products = gemm(rows, gate), gemm(rows, up)
        if biases is not None:
            products = products[0] + biases[0][expert], products[1] + biases[1][expert]
        middle = gated(*products, activation)
        if observe is not None:
            observe(int(expert), rows, middle)
        terms[tokens, slots] = gemm(middle, down)
        if biases is not None:
            terms[tokens, slots] += biases[2][expert]
    out = np.zeros_like(x)
    for slot in range(ids.shape[1]):
        out += weights[:, slot, None].astype(x.dtype) * terms[:, slot]
    return out
