"""Attention by cuDNN, which also gives the logarithm of each query's sum of exponentials: with it, attention
to the keys before a chunk and to the chunk's own becomes attention to both.

Each part is a call that cuDNN is fast at: all keys for all queries, and a causal square. Lower-right masks
take a kernel of half the speed. So it is on Hopper and its successors in data centres; elsewhere
FlashAttention has one speed for both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

Logs = tuple[torch.Tensor, torch.Tensor]
"""Attention [1, heads, n, D] in 16 bits, and float32 [1, heads, n]: log sum exp(scale * q k)."""
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None, bool], Logs]
"""(queries, keys, values, scale, is_causal), a square if it is causal."""

LEAST_PAIRS = 2**26
"""Of queries and keys in one call. Below, what is gained is less than what cuDNN takes to plan a new shape:
65 ms on an H200, and over a second once, for the first of its kind.
"""
_MAJORS = (9, 10)
"""Of GPUs' compute capabilities."""
_MERGED_BYTES = 32 * 2**20  # of heads in float32 at a time


def pays_apart(n: int, m: int) -> bool:
    """Whether the first m - n keys of m are worth a call of their own."""
    return n * (m - n) >= LEAST_PAIRS


def gives_logs(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether cuDNN takes them, and is faster; shapes as ``attention_and_logs``'s."""
    if not queries.is_cuda or torch.cuda.get_device_capability(queries.device)[0] not in _MAJORS:
        return False
    grouped = queries.shape[1] != keys.shape[1]
    return can_use_cudnn_attention(SDPAParams(queries, keys, values, None, 0.0, False, grouped))


def attention_and_logs(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float | None,
    attention: Attention | None = None,
) -> Logs:
    """Causal attention of queries [1, heads, n, D] to keys and values [1, kv_heads, m, D], n <= m, the last
    query at the last key. scale: None for D ** -0.5. attention: cuDNN's."""
    attention = attention or cudnn_attention
    before = keys.shape[2] - queries.shape[2]
    own = attention(queries, keys[:, :, before:], values[:, :, before:], scale, True)
    if before == 0:
        return own
    return merged(attention(queries, keys[:, :, :before], values[:, :, :before], scale, False), own)


def merged(first: Logs, second: Logs) -> Logs:
    """Attention to the keys of both: of the shares of their sums. Overwrites the first."""
    (mixed, logs), (other, other_logs) = first, second
    shares = torch.sigmoid(other_logs - logs)[..., None]
    at_once = max(1, _MERGED_BYTES // (8 * mixed.shape[2] * mixed.shape[3]))
    for begin in range(0, mixed.shape[1], at_once):
        heads = slice(begin, begin + at_once)
        part = mixed[:, heads].float()
        mixed[:, heads] = part.lerp_(other[:, heads].float(), shares[:, heads])
    return mixed, torch.logaddexp(logs, other_logs)


def cudnn_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, is_causal: bool
) -> Logs:
    """See ``Attention``."""
    mixed, logs = torch.ops.aten._scaled_dot_product_cudnn_attention(
        queries, keys, values, None, True, 0.0, is_causal, False, scale=scale
    )[:2]
    return mixed, logs.view(queries.shape[:3])
