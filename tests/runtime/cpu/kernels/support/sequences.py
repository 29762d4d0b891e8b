"""Sequences in memory for the attention kernels, and attention in float64."""

from __future__ import annotations

import numpy as np

from krasis.runtime.batch import Span
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.spans import LayerCache, SlotMemory, Spans


def cache_of(array: Array) -> LayerCache:
    """A layer alone in its slot's memory, [num_kv_heads, capacity, head_dim]."""
    return LayerCache(0, 0, array.shape[1], "f32" if array.dtype == np.float32 else "f16")


def place(k_cache: Array, v_cache: Array, start: int, rows: int) -> tuple[Spans, LayerCache]:
    """One sequence whose memory is the caches of one layer, [num_kv_heads, capacity, head_dim]."""
    spans = Spans(1, k_cache.nbytes, v_cache.nbytes)
    if rows:
        spans.set([Span(0, 0, rows, start)], [SlotMemory(k_cache, v_cache)])
    return spans, cache_of(k_cache)


def attention64(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    start: int,
    scale: float,
    window: int | None = None,
    sinks: Array | None = None,
) -> Array:
    """q [T, heads, D] at positions start.. over caches [kv_heads, capacity, D]: float64 [T, heads * D]."""
    tokens, heads, _ = q.shape
    group = heads // len(k_cache)
    out = np.empty((tokens, heads, v_cache.shape[2]))
    for row in range(tokens):
        end = start + row + 1
        begin = 0 if window is None else max(0, end - window)
        for head in range(heads):
            keys, values = (c[head // group, begin:end].astype(np.float64) for c in (k_cache, v_cache))
            scores = keys @ q[row, head].astype(np.float64) * scale
            if sinks is not None:
                scores = np.append(scores, np.float64(sinks[head]))
            shares = np.exp(scores - scores.max())
            out[row, head] = (shares / shares.sum())[: end - begin] @ values
    return out.reshape(tokens, -1)
