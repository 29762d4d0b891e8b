"""NumPy twins of the native functions of an index over tokens: see ``reference``."""

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
