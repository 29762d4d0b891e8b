"""Causal attention with a prefix, in pieces, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krasis.runtime import reference
from krasis.runtime.cpu.kernels import Heads
from krasis.runtime.gpu.kernels.attention import attend, causal_attention, head_pieces, pieces
from krasis.runtime.gpu.kernels.attention_logs import Logs, attention_and_logs, gives_logs
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
@pytest.mark.parametrize(
    ("start", "most_heads"), [(0, 4), (0, 3), (0, 2), (0, 1), (0, 0), (13, 4), (13, 3), (13, 1), (13, 0)]
)
def test_any_pieces_equal_float64(dtype: torch.dtype, start: int, most_heads: int) -> None:
    """Of heads, and, where not even one has room, of halves of the queries."""
    heads, tokens, capacity = Heads(4, 2, 32), 29, 64
    random = torch.Generator().manual_seed(5)
    qkv = torch.randn((tokens, heads.qkv_size), generator=random).to(dtype)
    keys, values = (torch.full((2, capacity, 32), float("nan"), dtype=dtype) for _ in range(2))
    for cache in (keys, values):  # what lies behind the last position is not looked at
        cache[:, : start + tokens] = torch.randn((2, start + tokens, 32), generator=random).to(dtype)
    out = torch.full((tokens, heads.attention_size), float("nan"), dtype=dtype)
    stream = Immediate()
    piece_bytes = 2 * 32 * (tokens * most_heads or 15) * (1 if start == 0 else 3)
    attend(stream, heads, qkv, keys, values, start, out, piece_bytes)
    assert stream.launches == 1 + (most_heads == 0)
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


def exact_logs(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None, is_causal: bool
) -> Logs:
    """What cuDNN gives, computed in float64 here."""
    q, k, v = (one[0].double() for one in (queries, keys, values))
    k, v = (one.repeat_interleave(len(q) // len(k), 0) for one in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(2) @ v).to(queries.dtype)[None], scores.logsumexp(2).float()[None]


@pytest.mark.parametrize(("tokens", "start"), [(29, 0), (29, 1), (29, 40), (1, 7)])
def test_attention_to_two_parts_is_attention_to_both(tokens: int, start: int) -> None:
    random = torch.Generator().manual_seed(4)
    # Of some queries nearly all of the sum lies before them, of others in the chunk itself.
    queries = (4 * torch.randn((1, 6, tokens, 32), generator=random)).half()
    keys, values = (torch.randn((1, 2, start + tokens, 32), generator=random).half() for _ in range(2))
    mixed, logs = attention_and_logs(queries, keys, values, None, exact_logs)
    right = expected(queries[0], keys[0], values[0])
    found = mixed[0].transpose(0, 1).double().numpy()
    assert np.linalg.norm(found - right) / np.linalg.norm(right) < 1e-3
    hidden = torch.ones(tokens, start + tokens).triu(start + 1).bool()
    scores = queries[0].double() @ keys[0].double().repeat_interleave(3, 0).transpose(1, 2) * 32**-0.5
    torch.testing.assert_close(
        logs[0].double(), scores.masked_fill(hidden, -torch.inf).logsumexp(2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: cuDNN's attention")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "start", "heads", "kv_heads", "dim", "scale"),
    [
        (1500, 0, 8, 2, 64, 0.2),
        (1500, 1100, 8, 2, 64, None),
        (1100, 3000, 6, 1, 128, None),
        (1024, 1024, 3, 3, 256, 0.05),
    ],
)
def test_cudnn_gives_logarithms(
    dtype: torch.dtype, tokens: int, start: int, heads: int, kv_heads: int, dim: int, scale: float | None
) -> None:
    random = torch.Generator().manual_seed(3)
    queries = torch.randn((1, heads, tokens, dim), generator=random).to(dtype)
    keys, values = (torch.randn((1, kv_heads, start + tokens, dim), generator=random).to(dtype) for _ in "kv")
    on_gpu = [one.cuda() for one in (queries, keys, values)]
    if not gives_logs(*on_gpu):
        pytest.skip("cuDNN's attention does not take this, or is not faster on this GPU")
    whole, logs = attention_and_logs(queries, keys, values, scale, exact_logs)
    found, found_logs = attention_and_logs(*on_gpu, scale)
    limit = 4e-3 if dtype == torch.bfloat16 else 6e-4
    error = (found.cpu().double() - whole.double()).norm() / whole.double().norm()
    assert error < limit
    torch.testing.assert_close(found_logs.cpu(), logs, rtol=1e-4, atol=1e-3)
    error = (causal_attention(*on_gpu, scale).cpu().double() - whole.double()).norm() / whole.double().norm()
    assert error < limit


def test_pieces_of_heads_share_keys() -> None:
    heads = Heads(12, 3, 32)
    whole = [(slice(0, 12), slice(0, 3))]
    assert head_pieces(heads, 12) == head_pieces(heads, 100) == whole
    assert head_pieces(heads, 11) == [(slice(0, 4), slice(0, 1)), (slice(4, 12), slice(1, 3))]
    halves = [(slice(2 * i, 2 * i + 2), slice(i // 2, i // 2 + 1)) for i in range(6)]
    assert head_pieces(heads, 3) == head_pieces(heads, 2) == halves
    assert len(head_pieces(heads, 0)) == len(head_pieces(heads, 1)) == 12


def test_pieces_are_few_and_even() -> None:
    assert pieces(0, 10, 4, piece_bytes=8 * 4) == [(0, 3), (3, 6), (6, 10)]
    assert pieces(5, 9, 4, piece_bytes=10**9) == [(5, 9)]
    assert pieces(0, 3, 1000, piece_bytes=1) == [(0, 1), (1, 2), (2, 3)]
