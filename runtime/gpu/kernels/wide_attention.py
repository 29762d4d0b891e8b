"""Causal attention of heads wider than FlashAttention takes: by the library's products of 16-bit matrices, on
tensor cores, with the scores of some queries at a time in memory, float32.
"""

from __future__ import annotations

import torch

SCORE_BYTES = 128 * 2**20
"""Of a piece of queries' scores, with their weights: the more, the seldomer keys and values are read."""
_ITEM_BYTES = 4 + 4 + 2  # of a score, its weight, and that in 16 bits
_UNIT = 1024.0
"""What a weight of 1 is in 16 bits: float16 then has small weights of long contexts, too."""


def wide_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    score_bytes: int = SCORE_BYTES,
) -> torch.Tensor:
    """[n, heads, D] of queries [n, heads, D], keys and values [kv_heads, m, D], n <= m, the last query at the
    last key, all of one 16-bit type. Weights are rounded to it, as in FlashAttention; sums are float32.
    """
    (n, heads, dim), (kv_heads, m, _) = queries.shape, keys.shape
    group = heads // kv_heads
    at_once = min(n, max(1, score_bytes // (_ITEM_BYTES * heads * m)))
    device, room = queries.device, heads * at_once * m
    scores, weights = (torch.empty(room, dtype=torch.float32, device=device) for _ in range(2))
    rounded = torch.empty(room, dtype=queries.dtype, device=device)
    out = torch.empty_like(queries)
    later = torch.ones((at_once, at_once), dtype=torch.bool, device=device).triu_(1)
    for begin in range(0, n, at_once):
        end = min(begin + at_once, n)
        count, last = end - begin, m - n + end
        own = (
            queries[begin:end]
            .view(count, kv_heads, group, dim)
            .permute(1, 2, 0, 3)
            .reshape(kv_heads, -1, dim)
        )
        shape = (kv_heads, group * count, last)
        part, share, factors = (
            flat[: heads * count * last].view(shape) for flat in (scores, weights, rounded)
        )
        _multiply(own, keys[:, :last].transpose(1, 2), part)
        if scale != 1:
            part.mul_(scale)
        # Of the keys, only these own ones may come after a query.
        part.view(kv_heads, group, count, last)[..., last - count :].masked_fill_(
            later[:count, :count], float("-inf")
        )
        torch.softmax(part, 2, out=share)
        torch.mul(share, _UNIT, out=factors)
        mixed = torch.empty((kv_heads, group * count, dim), dtype=torch.float32, device=device)
        _multiply(factors, values[:, :last], mixed)
        mixed = mixed.view(kv_heads, group, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)
        torch.mul(mixed, 1 / _UNIT, out=out[begin:end])
    return out


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out float32 = a x b, batches of 16-bit matrices, in float32 sums."""
    if a.is_cuda:
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:  # the double: torch's CPU has no such product
        torch.bmm(a.float(), b.float(), out=out)
