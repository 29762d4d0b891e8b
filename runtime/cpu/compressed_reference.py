"""Compressed attention (CSA and HCA of DeepSeek-V4) in NumPy: how windows of tokens become entries, which of
them queries see, and the softmax over these, the last tokens and the sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.models.mixers import CompressedAttention
from krasis.formats.models.rope import Rope
from krasis.runtime import reference

Array = npt.NDArray[Any]
_QUERIES_AT_ONCE = 32  # bounds the scores, [queries, heads, keys]
_GATHER_FROM = 4  # times as many entries as are chosen: then each query's are laid side by side


@dataclass(frozen=True, slots=True)
class Past:
    """What the rows of a span attend to. keys: [n, dim] of the positions from ``first`` on; entries: [num,
    dim], of whole windows from the sequence's beginning on. chosen: bool [T, num], None where a query sees
    all of whole windows.
    """

    keys: Array
    first: int
    entries: Array
    chosen: Array | None = None


def turned(x: Array, cos: Array, sin: Array, rope: Rope, *, back: bool = False) -> Array:
    """x [T, heads, D] with its last channels turned by the tables' rows, [T, dims / 2] each, or turned
    back."""
    dims = 2 * cos.shape[-1]
    last = reference.rotate(x[..., -dims:], cos, -sin if back else sin, rope)
    return np.concatenate([x[..., :-dims], last], axis=-1)


def entries_of(keys: Array, gates: Array, positions: Array, *, overlap: bool) -> Array:
    """[n, dim]: by channel the keys of each window's tokens, weighed by a softmax of their gates: keys, gates
    [n, ratio, width], positions [ratio, width], which are added to the gates. overlap: width is 2 dim; the
    first half counts for the window behind. Nothing stands before the first window.
    """
    logits = gates + positions.astype(gates.dtype)
    if overlap:
        dim = keys.shape[2] // 2
        keys, logits = (
            np.concatenate([_behind(x[..., :dim], fill), x[..., dim:]], axis=1)
            for x, fill in ((keys, 0.0), (logits, -np.inf))
        )
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    pooled: Array = (weights * keys).sum(axis=1) / weights.sum(axis=1)
    return pooled


def _behind(x: Array, fill: float) -> Array:
    """x [n, ..] one place later; the last is left out."""
    return np.concatenate([np.full_like(x[:1], fill), x[:-1]])


def chosen_entries(q: Array, weights: Array, keys: Array, start: int, ratio: int, budget: int) -> Array:
    """bool [T, num]: of the entries that rows at start.. see the best ``budget``: by the sum over heads of
    weight * max(q . key, 0). q [T, heads, dim], weights [T, heads], keys [num, dim]. Positive factors on all,
    which the model has, change no choice.
    """
    seen = _whole(start, len(q), ratio, len(keys))
    if seen.sum(axis=1).max(initial=0) <= budget:
        return seen
    scores = np.empty(seen.shape, q.dtype)
    for first in range(0, len(q), _QUERIES_AT_ONCE):
        rows = slice(first, first + _QUERIES_AT_ONCE)
        products = np.maximum(q[rows] @ keys.T.astype(q.dtype), 0)  # [rows, heads, num]
        scores[rows] = (weights[rows, None, :] @ products)[:, 0]
    scores[~seen] = -np.inf
    best = np.argpartition(-scores, budget - 1, axis=1)[:, :budget]
    chosen = np.zeros(seen.shape, bool)
    np.put_along_axis(chosen, best, values=True, axis=1)
    picked: Array = chosen & seen
    return picked


def _whole(start: int, num_rows: int, ratio: int, num_entries: int) -> Array:
    """bool [T, num]: entries of windows that are whole with the row's own token."""
    ends = (np.arange(start, start + num_rows) + 1) // ratio
    whole: Array = np.arange(num_entries) < ends[:, None]
    return whole


def attend(q: Array, past: Past, start: int, mixer: CompressedAttention, sinks: Array) -> Array:
    """[T, heads, dim] of q [T, heads, dim] at positions start..; keys are values, too. sinks: [heads], one
    more logit in each softmax."""
    out = np.empty_like(q)
    gathers = past.chosen is not None and mixer.selection is not None
    budget = mixer.selection.budget if mixer.selection is not None else 0
    at_once = 1 if gathers and len(past.entries) > _GATHER_FROM * budget else _QUERIES_AT_ONCE
    for first in range(0, len(q), at_once):
        last = min(first + at_once, len(q))
        own = slice(max(0, start + first - mixer.window + 1 - past.first), start + last - past.first)
        entries, seen = past.entries, np.zeros((last - first, 0), bool)
        if past.chosen is not None:
            seen = past.chosen[first:last]
        elif mixer.ratio is not None:
            seen = _whole(start + first, last - first, mixer.ratio, len(entries))
        if at_once == 1:
            entries, seen = entries[seen[0]], seen[:, seen[0]]
        places = past.first + np.arange(own.start, own.stop)
        away = np.arange(start + first, start + last)[:, None] - places
        near = (away >= 0) & (away < mixer.window)
        both = np.concatenate([past.keys[own], entries]).astype(q.dtype)
        mask = np.concatenate([near, seen], axis=1)
        out[first:last] = _mixed(q[first:last], both, mask, mixer.scale, sinks)
    return out


def _mixed(q: Array, keys: Array, mask: Array, scale: float, sinks: Array) -> Array:
    """Of q [T, heads, dim] over keys [n, dim], which are values; mask: bool [T, n]."""
    tokens, heads, dim = q.shape
    scores = (q.reshape(-1, dim) @ keys.T * np.asarray(scale, q.dtype)).reshape(tokens, heads, -1)
    scores = np.where(mask[:, None], scores, np.asarray(-np.inf, q.dtype))
    with_sink = np.broadcast_to(sinks.astype(q.dtype)[None, :, None], (tokens, heads, 1))
    shares = reference.softmax(np.concatenate([scores, with_sink], axis=2))[..., :-1]
    mixed: Array = shares.reshape(tokens * heads, -1) @ keys
    return mixed.reshape(q.shape)
