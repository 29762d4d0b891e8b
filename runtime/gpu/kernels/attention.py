"""Causal attention of a chunk's queries over the cache, through torch's SDPA: flash on a GPU.

Query i of n sees keys 0..m-n+i of m: the mask is aligned at the lower right. ``is_causal=True`` aligns it at
the upper left, which is the same only without a prefix (n = m); there it is twice as fast (measured on an
H100: 610-640 TFLOP/s against 298-318 in lower-right pieces of 2048). So a whole prompt is one call of it for
as many heads as there is memory for, and the keys before a chunk are taken apart from its own
(``attention_logs.py``).
"""

from __future__ import annotations

import itertools

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention

from krasis.runtime.cpu.kernels import Heads
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.attention_logs import attention_and_logs, gives_logs, pays_apart
from krasis.runtime.gpu.kernels.launcher import present
from krasis.runtime.gpu.kernels.local_attention import MOST_CHANNELS, attention_with_sinks, local_attention
from krasis.runtime.planning.assumptions import ATTENTION_PIECE_BYTES

PIECE_BYTES = ATTENTION_PIECE_BYTES
"""SDPA allocates its result; heads, and queries, are taken in pieces whose results fit in this, from the
reserve of the plan.
"""
APART_PIECE_BYTES = PIECE_BYTES // 3
"""The same where a result is made of two, or has a sink's share taken from it."""


def pieces(
    begin: int, end: int, attention_size: int, piece_bytes: int = PIECE_BYTES
) -> list[tuple[int, int]]:
    """Ranges of queries [begin, end), as few and as even as can be."""
    most = max(1, piece_bytes // (2 * attention_size))
    return _even(begin, end, most)


def head_pieces(heads: Heads, most: int) -> list[tuple[slice, slice]]:
    """(query heads, key heads) of pieces of up to ``most`` query heads, at least one: whole groups that share
    keys, or parts of one group."""
    group = heads.num_heads // heads.num_kv_heads
    if most >= group:
        ranges = _even(0, heads.num_kv_heads, most // group)
        return [(slice(first * group, last * group), slice(first, last)) for first, last in ranges]
    return [
        (slice(kv * group + first, kv * group + last), slice(kv, kv + 1))
        for kv in range(heads.num_kv_heads)
        for first, last in _even(0, group, max(1, most))
    ]


def _even(begin: int, end: int, most: int) -> list[tuple[int, int]]:
    count = max(1, -(-(end - begin) // most))
    cuts = [begin + (end - begin) * index // count for index in range(count + 1)]
    return [(first, last) for first, last in itertools.pairwise(cuts) if first < last]


def attend(
    stream: Stream,
    heads: Heads,
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    out: torch.Tensor,
    piece_bytes: int = PIECE_BYTES,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """out [T, attention_size] = attention of the queries in qkv [T, qkv_size] at positions start..start+T-1.

    keys, values [num_kv_heads, capacity, head_dim] hold positions 0..start+T-1, the queries' own included.
    16-bit; q is rotated already. scale: of the scores, None for head_dim ** -0.5. window: positions that a
    query sees, None for all; sinks float32 [num_heads]: one more logit a head. SDPA knows neither, and would
    keep all scores of heads wider than FlashAttention's.
    """
    if heads.head_dim > MOST_CHANNELS or (window is not None and window < start + len(qkv)):
        _attend_locally(stream, heads, qkv, keys, values, start, out, piece_bytes, scale, window, sinks)
        return
    if scale == heads.head_dim**-0.5:
        scale = None
    most = piece_bytes if start == 0 and sinks is None else piece_bytes // 3
    for begin, end in pieces(0, len(qkv), heads.head_dim, most):
        _attend_rows(
            stream,
            heads,
            qkv[begin:end, : heads.attention_size],
            keys[:, : start + end],
            values[:, : start + end],
            out[begin:end],
            scale,
            sinks,
            most // (2 * heads.head_dim * (end - begin)),
        )


def _attend_locally(
    stream: Stream,
    heads: Heads,
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    out: torch.Tensor,
    piece_bytes: int,
    scale: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> None:
    scale = heads.head_dim**-0.5 if scale is None else scale
    for begin, end in pieces(0, len(qkv), heads.attention_size, piece_bytes // 4):  # sinks: in float32, too
        first = 0 if window is None else max(0, start + begin - window + 1)
        queries, to = qkv[begin:end, : heads.attention_size], out[begin:end]
        seen = keys[:, first : start + end], values[:, first : start + end]

        def action(
            _: int,
            queries: torch.Tensor = queries,
            seen: tuple[torch.Tensor, torch.Tensor] = seen,
            to: torch.Tensor = to,
        ) -> None:
            split = queries.view(-1, heads.num_heads, heads.head_dim)
            to.copy_(local_attention(split, *seen, scale, window, sinks).flatten(1))

        stream.launch("attention", action, reads=present(queries, *seen, sinks), writes=(to,))


def _attend_rows(
    stream: Stream,
    heads: Heads,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    scale: float | None,
    sinks: torch.Tensor | None,
    heads_at_once: int,
) -> None:
    def action(_: int) -> None:
        split = queries.view(len(queries), heads.num_heads, heads.head_dim).transpose(0, 1)[None]
        into = out.view(len(out), heads.num_heads, heads.head_dim)
        for own, shared in head_pieces(heads, heads_at_once):
            seen = split[:, own], keys[None, shared], values[None, shared]
            if sinks is None:
                mixed = causal_attention(*seen, scale)
            else:
                mixed = attention_with_sinks(*seen, scale, sinks[own])
            into[:, own] = mixed[0].transpose(0, 1)

    stream.launch("attention", action, reads=present(queries, keys, values, sinks), writes=(out,))


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """[1, heads, n, D] of queries [1, heads, n, D], keys and values [1, kv_heads, m, D], n <= m, the last
    query at the last key.
    """
    if not queries.is_cuda and queries.dtype != torch.float32:
        # In place of a GPU's sums, which are float32: 16-bit ones of a CPU round by how many rows there are.
        return causal_attention(queries.float(), keys.float(), values.float(), scale).to(queries.dtype)
    n, m = queries.shape[2], keys.shape[2]
    grouped = queries.shape[1] != keys.shape[1]
    if n == 1:  # sees every key
        return scaled_dot_product_attention(queries, keys, values, scale=scale, enable_gqa=grouped)
    if n == m:
        return scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped
        )
    if pays_apart(n, m) and gives_logs(queries, keys, values):
        return attention_and_logs(queries, keys, values, scale)[0]
    return _lower_right(queries, keys, values, scale, grouped)


def _lower_right(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, grouped: bool
) -> torch.Tensor:
    """What torch.nn.attention.bias does for ``causal_lower_right``; its import takes as long again as all of
    torch, because it brings the compiler.
    """
    if can_use_flash_attention(SDPAParams(queries, keys, values, None, 0.0, False, grouped)):
        # Flash aligns causal masks at the lower right; sizes of heads are multiples of 8 here.
        found: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            queries, keys, values, 0.0, is_causal=True, return_debug_mask=False, scale=scale
        )[0]
        return found
    n, m = queries.shape[2], keys.shape[2]
    mask = torch.ones(n, m, dtype=torch.bool, device=queries.device).tril(diagonal=m - n)
    return scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
