"""krasis_attention against float64 and torch; its bits against any batching, threads and instruction set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sequences import place

from krasis.formats.errors import NativeError, ResourceError
from krasis.runtime.cpu.kernels import Heads, attention_workspace_bytes, workspace


@dataclass
class Case:
    heads: Heads
    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    first_query: int = 0

    @classmethod
    def make(cls, rng, num_keys, shape, kv_dtype=np.float32, spread=1.0, first_query=0):
        """Queries for positions from first_query on; NaN beyond the last one, where nothing may be read."""
        heads = Heads(*shape)
        caches = [
            np.full((heads.num_kv_heads, num_keys + 9, heads.head_dim), np.nan, kv_dtype) for _ in range(2)
        ]
        for cache in caches:
            cache[:, :num_keys] = rng.standard_normal((heads.num_kv_heads, num_keys, heads.head_dim))
        q = (rng.standard_normal((num_keys - first_query, heads.attention_size)) * spread).astype(np.float32)
        return cls(heads, q, *caches, first_query)

    def queries(self, start, tokens):
        first = start - self.first_query
        return self.q[first : first + tokens]

    def run(self, kernels, start, tokens):
        out = np.full((tokens, self.heads.attention_size), np.nan, np.float32)
        scratch = workspace(attention_workspace_bytes(tokens, start + tokens, self.heads))
        scratch.fill(0xFF)  # NaN
        q = self.queries(start, tokens)
        scale = self.heads.head_dim**-0.5
        spans, cache = place(self.k_cache, self.v_cache, start, tokens)
        kernels.attention(q, self.heads, spans, cache, scale, out, scratch)
        return out

    def expected(self, start, tokens):
        """torch's own attention in float64."""
        dim, group = self.heads.head_dim, self.heads.num_heads // self.heads.num_kv_heads
        end = start + tokens
        q = (
            torch.from_numpy(self.queries(start, tokens))
            .double()
            .view(tokens, self.heads.num_heads, dim)
            .transpose(0, 1)
        )
        k, v = (
            torch.from_numpy(cache[:, :end]).double().repeat_interleave(group, dim=0)
            for cache in (self.k_cache, self.v_cache)
        )
        mask = torch.arange(end)[None, :] <= torch.arange(start, end)[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(0, 1).reshape(tokens, self.heads.attention_size).numpy()


@pytest.mark.parametrize(
    ("tokens", "start"), [(0, 3), (1, 0), (1, 63), (1, 64), (2, 62), (7, 255), (64, 0), (65, 1), (300, 0)]
)
@pytest.mark.parametrize("shape", [(8, 1, 128), (4, 2, 64), (3, 3, 80)])
@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
def test_equals_torch(kernels, rng, tokens, start, shape, kv_dtype):
    case = Case.make(rng, start + tokens, shape, kv_dtype, spread=3.0)
    np.testing.assert_allclose(
        case.run(kernels, start, tokens), case.expected(start, tokens), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 16),
        (70, 1, 32),
        (24, 2, 256),
        (12, 1, 48),
        (16, 1, 112),
        (9, 1, 272),
        (40, 1, 512),
        (2, 2, 576),
    ],
)
def test_odd_heads(kernels, rng, shape):
    case = Case.make(rng, 90, shape)
    np.testing.assert_allclose(case.run(kernels, 10, 80), case.expected(10, 80), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(case.run(kernels, 89, 1), case.expected(89, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
def test_long_context(kernels, rng, tokens, kv_dtype):
    start = 2000 - tokens
    case = Case.make(rng, 2000, (8, 1, 128), kv_dtype, spread=4.0, first_query=start)
    np.testing.assert_allclose(
        case.run(kernels, start, tokens), case.expected(start, tokens), rtol=1e-4, atol=1e-5
    )


def test_sharp_softmax_over_splits(kernels, rng):
    """Scores of some hundreds, the largest now in the first split, now in the last."""
    case = Case.make(rng, 700, (2, 1, 64), spread=100.0)
    for winner in (0, 300, 699):
        case.k_cache[0, winner] = case.q[699, :64] / 50
        out = case.run(kernels, 699, 1)
        np.testing.assert_allclose(out, case.expected(699, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 1, 128), (2, 2, 64), (10, 2, 80)])
@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
def test_same_bits_for_any_chunking(make_kernels, isa, rng, shape, kv_dtype):
    """Decode, small and large chunks, one pass: the same bits; also between instruction sets."""
    total = 600
    case = Case.make(rng, total, shape, kv_dtype)
    whole = case.run(make_kernels("avx2", 2), 0, total)
    kernels = make_kernels(isa, 2)
    for chunks in ([total], [1, 2, 3, 4, 5, 49, 64, 65, 63, 256, 88], [300, 300]):
        start = 0
        for tokens in chunks:
            part = case.run(kernels, start, tokens)
            assert part.tobytes() == whole[start : start + tokens].tobytes(), (start, tokens)
            start += tokens
        assert start == total
    for position in (0, 1, 62, 63, 64, 65, 127, 128, 255, 256, 257, 511, 512, 599):
        assert case.run(kernels, position, 1).tobytes() == whole[position].tobytes(), position


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_same_bits_for_any_threads(make_kernels, isa, rng, threads):
    case = Case.make(rng, 1100, (8, 2, 64), np.float16)
    one, many = make_kernels(isa, 1), make_kernels(isa, threads)
    for start, tokens in ((1099, 1), (1096, 4), (800, 300)):
        assert case.run(many, start, tokens).tobytes() == case.run(one, start, tokens).tobytes()


def test_later_infinities_do_not_reach_earlier_queries(kernels, rng):
    case = Case.make(rng, 40, (8, 1, 128))
    want = case.run(kernels, 0, 20)
    case.v_cache[:, 20:] = np.inf
    case.k_cache[:, 20:] = np.nan
    assert case.run(kernels, 0, 40)[:20].tobytes() == want.tobytes()


def test_reads_queries_from_the_fused_projection(kernels, rng):
    case = Case.make(rng, 70, (4, 2, 64))
    want = case.run(kernels, 0, 70)
    fused = np.full((70, case.heads.qkv_size), np.nan, np.float32)
    fused[:, :256] = case.q
    case.q = fused
    assert case.run(kernels, 0, 70).tobytes() == want.tobytes()


def test_workspace_never_shrinks(rng):
    heads = Heads(16, 2, 128)
    sizes = [
        [attention_workspace_bytes(tokens, end, heads) for end in range(0, 2000, 150)] for tokens in range(9)
    ]
    table = np.array(sizes)
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    assert table.max() > 0


def test_refuses_a_short_workspace(kernels, rng):
    case = Case.make(rng, 1000, (4, 2, 64))
    out = np.zeros((1, 256), np.float32)
    need = attention_workspace_bytes(1, 1000, case.heads)
    spans, cache = place(case.k_cache, case.v_cache, 999, 1)
    with pytest.raises(ResourceError, match="krasis_attention"):
        kernels.attention(case.q[999:], case.heads, spans, cache, 1.0, out, workspace(need - 1))


@pytest.mark.parametrize(
    ("shape", "start"),
    [((2, 1, 24), 0), ((2, 1, 592), 0), ((3, 2, 32), 0), ((2, 1, 32), 10)],
)
def test_refuses(kernels, rng, shape, start):
    case = Case.make(rng, 1, shape)
    out = np.zeros((1, case.heads.attention_size), np.float32)
    spans, cache = place(case.k_cache, case.v_cache, start, 1)
    with pytest.raises(NativeError, match=r"krasis_attention\b"):
        kernels.attention(case.q, case.heads, spans, cache, 1.0, out, workspace(0))
