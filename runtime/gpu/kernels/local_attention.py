"""Causal attention in windows, and with sinks: through FlashAttention as torch has it on a GPU.

SDPA itself knows neither. A sink is one more logit of a head, without a value: attention without it, times
sigmoid(L - sink), where L is the logarithm of the sum of its exponentials, which FlashAttention gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from krasis.runtime.gpu.kernels.attention_logs import LEAST_PAIRS, attention_and_logs, gives_logs
from krasis.runtime.gpu.kernels.wide_attention import wide_attention

_EXACT_BYTES = 2**24  # of a piece's scores
MOST_CHANNELS = 256
"""Of a head of FlashAttention."""


@dataclass(frozen=True, slots=True)
class _Form:
    """What ``local_attention`` is told besides queries, keys and values."""

    scale: float
    window: int | None
    sinks: torch.Tensor | None


def local_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[n, heads, D] of queries [n, heads, D], keys and values [kv_heads, m, D], n <= m, the last query at the
    last key.

    window: a query sees so many keys, its own the last; None: all. sinks: float32 [heads] or None.
    """
    is_wide = queries.shape[-1] > MOST_CHANNELS
    if is_wide and window is None and sinks is None:
        return wide_attention(queries, keys, values, scale)
    if queries.device.type == "cuda" and not is_wide:
        return _flash(queries, keys, values, _Form(scale, window, sinks))
    return _exact(queries, keys, values, _Form(scale, window, sinks))


def attention_with_sinks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """[1, heads, n, D] of queries [1, heads, n, D] that see all keys up to their own, keys and values
    [1, kv_heads, m, D] and sinks float32 [heads]."""
    scale = queries.shape[3] ** -0.5 if scale is None else scale
    if queries.shape[2] * keys.shape[2] >= LEAST_PAIRS and gives_logs(queries, keys, values):
        mixed, logs = attention_and_logs(queries, keys, values, scale)
        return mixed * torch.sigmoid(logs - sinks[:, None])[..., None]  # float32, to be rounded once
    mixed = local_attention(queries[0].transpose(0, 1), keys[0], values[0], scale, None, sinks)
    return mixed.transpose(0, 1)[None]


def _flash(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: _Form) -> torch.Tensor:
    """Its causal mask is aligned at the last key; key tiles before the window are skipped."""
    n, m = queries.shape[0], keys.shape[1]
    results: list[torch.Tensor] = torch.ops.aten._flash_attention_forward(
        queries[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        None,
        None,
        n,
        m,
        0.0,
        True,
        False,
        scale=form.scale,
        window_size_left=None if form.window is None or form.window >= m else form.window - 1,
        window_size_right=None,
    )
    mixed, logarithms = results[0], results[1]
    if form.sinks is None:
        return mixed[0]
    share = torch.sigmoid(logarithms[0] - form.sinks[:, None])  # [heads, n]
    return mixed[0] * share.t()[:, :, None]  # float32, to be rounded once


def _exact(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: _Form) -> torch.Tensor:
    """In float32, by products of matrices: for tests without a GPU, and wide heads with windows or sinks,
    which no model has.
    """
    (n, heads, _), m = queries.shape, keys.shape[1]
    at_once = max(1, _EXACT_BYTES // (4 * heads * m))
    parts = []
    for begin in range(0, n, at_once):
        end = min(begin + at_once, n)
        last = m - n + end
        first = 0 if form.window is None else max(0, m - n + begin - form.window + 1)
        parts.append(_exact_piece(queries[begin:end], keys[:, first:last], values[:, first:last], form))
    return torch.cat(parts)


def _exact_piece(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: _Form
) -> torch.Tensor:
    (n, heads, dim), (kv_heads, m, _) = queries.shape, keys.shape
    grouped = queries.view(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).float()
    scores = grouped.flatten(1, 2) @ keys.float().transpose(1, 2) * form.scale  # [kv_heads, group * n, m]
    scores = scores.view(heads, n, m)
    position = torch.arange(m - n, m, device=queries.device)[:, None]
    key = torch.arange(m, device=queries.device)
    hidden = key > position
    if form.window is not None:
        hidden |= key <= position - form.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if form.sinks is not None:
        scores = torch.cat([scores, form.sinks[:, None, None].expand(heads, n, 1)], dim=2)
    weights = torch.softmax(scores, dim=2)[:, :, :m].reshape(kv_heads, -1, m)
    mixed = (weights @ values.float()).view(heads, n, dim)
    return mixed.transpose(0, 1).to(queries.dtype)
