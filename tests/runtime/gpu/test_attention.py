"""Causal attention with a prefix, in pieces, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krasis.runtime import reference
from krasis.runtime.cpu.kernels import Heads
from krasis.runtime.gpu.kernels.attention import attend, causal_attention, pieces
from krasis.runtime.gpu.kernels.local_attention import local_attention
from krasis.runtime.gpu.kernels.wide_attention import wide_attention


class Immediate:
    """A stream that runs what is launched at once."""

    name = "immediate"

    def __init__(self) -> None:
        self.launches = 0

    def launch(self, name: str, action, *, reads, writes) -> None:
        self.launches += 1
        action(0)


def expected(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    """float64 [tokens, heads, D] of queries [heads, tokens, D] whose last sees the last key."""
    q = queries.double().numpy().transpose(1, 0, 2)
    start = keys.shape[1] - queries.shape[1]
    return reference.attention(q, keys.double().numpy(), values.double().numpy(), start, q.shape[-1] ** -0.5)


@pytest.mark.parametrize(
    ("tokens", "start", "heads", "kv_heads", "dim"),
    [
        (1, 0, 4, 2, 32),
        (1, 70, 4, 2, 32),
        (33, 0, 6, 1, 64),
        (33, 1, 4, 4, 32),
        (17, 90, 8, 2, 128),
        (2, 3, 3, 3, 16),
    ],
)
def test_the_mask_is_aligned_at_the_last_key(
    tokens: int, start: int, heads: int, kv_heads: int, dim: int
) -> None:
    random = torch.Generator().manual_seed(3)
    queries = torch.randn((heads, tokens, dim), generator=random, dtype=torch.float32)
    keys, values = (torch.randn((kv_heads, start + tokens, dim), generator=random) for _ in range(2))
    found = causal_attention(queries[None], keys[None], values[None])[0].transpose(0, 1).numpy()
    np.testing.assert_allclose(found, expected(queries, keys, values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("start", "piece_tokens"), [(0, 100), (0, 7), (13, 100), (13, 10), (13, 1)])
def test_any_pieces_equal_float64(dtype: torch.dtype, start: int, piece_tokens: int) -> None:
    heads, tokens, capacity = Heads(4, 2, 32), 29, 64
    random = torch.Generator().manual_seed(5)
    qkv = torch.randn((tokens, heads.qkv_size), generator=random).to(dtype)
    keys, values = (torch.full((2, capacity, 32), float("nan"), dtype=dtype) for _ in range(2))
    for cache in (keys, values):  # what lies behind the last position is not looked at
        cache[:, : start + tokens] = torch.randn((2, start + tokens, 32), generator=random).to(dtype)
    out = torch.full((tokens, heads.attention_size), float("nan"), dtype=dtype)
    stream = Immediate()
    attend(stream, heads, qkv, keys, values, start, out, piece_bytes=2 * piece_tokens * heads.attention_size)
    assert stream.launches == -(-tokens // piece_tokens)
    queries = qkv[:, : heads.attention_size].reshape(tokens, 4, 32).transpose(0, 1)
    right = expected(queries, keys[:, : start + tokens], values[:, : start + tokens]).reshape(tokens, -1)
    error = np.linalg.norm(out.double().numpy() - right) / np.linalg.norm(right)
    assert error < (4e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize(
    ("window", "has_sinks", "start", "piece_tokens"),
    [(None, True, 0, 100), (8, False, 0, 100), (8, True, 13, 10), (1, True, 13, 5), (100, True, 3, 100)],
)
def test_windows_and_sinks_equal_float64(
    window: int | None, has_sinks: bool, start: int, piece_tokens: int
) -> None:
    heads, tokens, capacity, dtype = Heads(6, 2, 32), 29, 64, torch.float16
    random = torch.Generator().manual_seed(6)
    qkv = torch.randn((tokens, heads.qkv_size), generator=random).to(dtype)
    keys, values = (torch.full((2, capacity, 32), float("nan"), dtype=dtype) for _ in range(2))
    for cache in (keys, values):
        cache[:, : start + tokens] = torch.randn((2, start + tokens, 32), generator=random).to(dtype)
    # A sink far above the logits takes nearly everything, one far below nothing.
    sinks = torch.tensor([-30.0, 0.5, 2.0, 30.0, -1.0, 4.0]) if has_sinks else None
    out = torch.full((tokens, heads.attention_size), float("nan"), dtype=dtype)
    piece_bytes = 4 * 2 * piece_tokens * heads.attention_size
    attend(Immediate(), heads, qkv, keys, values, start, out, piece_bytes, 0.3, window, sinks)
    right = reference.attention(
        qkv[:, : heads.attention_size].reshape(tokens, 6, 32).double().numpy(),
        keys.double().numpy(),
        values.double().numpy(),
        start,
        0.3,
        window,
        None if sinks is None else sinks.double().numpy(),
    ).reshape(tokens, -1)
    error = np.linalg.norm(out.double().numpy() - right) / np.linalg.norm(right)
    assert error < 5e-4


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "start", "at_once", "scale"),
    [(29, 0, 29, 1.0), (29, 40, 7, 0.06), (1, 70, 3, 0.06), (5, 0, 1, 1)],
)
def test_wide_heads_equal_float64(
    device: str, dtype: torch.dtype, tokens: int, start: int, at_once: int, scale: float
) -> None:
    """Whatever number of queries is taken at once."""
    random, m = torch.Generator().manual_seed(11), start + tokens
    q = (0.3 * torch.randn((tokens, 6, 512), generator=random)).to(dtype)
    keys, values = (torch.randn((2, m + 3, 512), generator=random).to(dtype) for _ in range(2))
    score_bytes = 10 * 6 * m * at_once
    seen = (one[:, :m].to(device) for one in (keys, values))
    found = wide_attention(q.to(device), *seen, scale, score_bytes).cpu().double().numpy()
    exact = (one.double().numpy() for one in (q, keys[:, :m], values[:, :m]))
    right = reference.attention(*exact, start, scale)
    assert np.linalg.norm(found - right) / np.linalg.norm(right) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's FlashAttention")
@pytest.mark.parametrize(("window", "has_sinks"), [(None, True), (128, True), (128, False), (5000, True)])
@pytest.mark.parametrize(("tokens", "start"), [(1500, 0), (700, 900), (1, 700)])
def test_flash_attention_has_the_same_windows(
    window: int | None, has_sinks: bool, tokens: int, start: int
) -> None:
    random = torch.Generator().manual_seed(9)
    q, k, v = (
        torch.randn(shape, generator=random).bfloat16()
        for shape in ((tokens, 16, 64), (2, start + tokens, 64), (2, start + tokens, 64))
    )
    sinks = torch.randn(16, generator=random) if has_sinks else None
    on_gpu = None if sinks is None else sinks.cuda()
    found = local_attention(q.cuda(), k.cuda(), v.cuda(), 0.2, window, on_gpu).double().cpu().numpy()
    right = reference.attention(
        *(one.double().numpy() for one in (q, k, v)),
        start,
        0.2,
        window,
        None if sinks is None else sinks.double().numpy(),
    )
    assert np.linalg.norm(found - right) / np.linalg.norm(right) < 4e-3


def test_pieces_are_few_and_even() -> None:
    assert pieces(0, 10, 4, piece_bytes=8 * 4) == [(0, 3), (3, 6), (6, 10)]
    assert pieces(5, 9, 4, piece_bytes=10**9) == [(5, 9)]
    assert pieces(0, 3, 1000, piece_bytes=1) == [(0, 1), (1, 2), (2, 3)]
