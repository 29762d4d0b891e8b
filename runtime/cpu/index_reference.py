"""NumPy twins of the native functions of an index over tokens or pools: see ``reference``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    away = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(away * away, axis=-1, keepdims=True)
    inverse = 1 / np.sqrt(variance + np.asarray(eps, x.dtype))
    normed: Array = away * inverse * weight.astype(x.dtype) + bias.astype(x.dtype)
    return normed


def index_scores(q: Array, weights: Array, keys: Array) -> Array:
    """[T, n] = sum over heads of weight * max(q . key, 0): q [T, heads, dim], weights [T, heads], keys
    [n, dim]. Positive factors on all, which models have, change no choice."""
    products = np.maximum(np.einsum("thd,nd->thn", q, keys.astype(q.dtype), optimize=True), 0)
    scores: Array = np.einsum("th,thn->tn", weights, products)
    return scores


def best_positions(scores: Array, start: int, budget: int) -> Array:
    """bool [T, n]: the positions that rows at start.. attend to by their scores [T, n]: all that a row sees,
    if these are budget at most; else the budget best, of equal ones the first."""
    num_rows, num_keys = scores.shape
    seen = np.arange(num_keys) <= np.arange(start, start + num_rows)[:, None]
    order = np.argsort(-np.where(seen, scores, -np.inf), axis=-1, kind="stable")[:, :budget]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, values=True, axis=-1)
    picked: Array = chosen & seen
    return picked


def pool_keys(keys: Array, gates: Array, positions: Array) -> Array:
    """[n, dim] of whole pools, by channel the keys of their tokens weighed by a softmax of their gates: keys,
    gates [n * block, dim], positions [block, dim], which are added to the gates."""
    shape = (-1, *positions.shape)
    logits = gates.reshape(shape) + positions.astype(gates.dtype)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    pooled: Array = (weights * keys.reshape(shape)).sum(axis=1) / weights.sum(axis=1)
    return pooled


def best_pools(scores: Array, start: int, num_keys: int, budget: int, block: int) -> Array:
    """bool [T, num_keys]: the positions that rows at start.. attend to by the scores [T, n] of whole pools of
    block tokens: the budget / block best of those whose last token a row sees, of equal ones the first, and
    the tokens behind the last of these."""
    positions = np.arange(start, start + len(scores))[:, None]
    whole = (positions + 1) // block
    seen = np.arange(scores.shape[1]) < whole
    order = np.argsort(-np.where(seen, scores, -np.inf), axis=-1, kind="stable")[:, : budget // block]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, values=True, axis=-1)
    keys = np.arange(num_keys)
    picked = np.zeros((len(scores), num_keys), dtype=bool)
    picked[:, : scores.shape[1] * block] = np.repeat(chosen & seen, block, axis=1)
    both: Array = picked | ((keys >= whole * block) & (keys <= positions))
    return both
