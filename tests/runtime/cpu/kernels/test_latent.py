"""The kernels of latent attention against float64, and their bits against any threads and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from sequences import attention64, cache_of

from krasis.formats.errors import NativeError
from krasis.formats.layouts import Int8RowsLayout
from krasis.formats.layouts.matrix import MatrixView
from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.rope import QueryTemperature, Rope
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.heads import Heads, Rotation
from krasis.runtime.cpu.kernels import attention_workspace_bytes, workspace
from krasis.runtime.cpu.latent_kernels import gemm_int8_heads, latent_store
from krasis.runtime.cpu.rope import rope_tables
from krasis.runtime.cpu.spans import SlotMemory, Spans

CAPACITY = 90


def mixer(style="interleaved", temperature=None, heads=5, rotates=True, sizes=(64, 32, 96)):
    nope_dim, rope_dim, kv_rank = sizes
    rope = Rope(rope_dim, 10_000.0, style) if rotates else None
    return LatentAttention(
        heads, None, kv_rank, nope_dim, rope_dim, 32, rope, 0.1, latent_eps=1e-5, temperature=temperature
    )


def spans_of(caches, parts):
    """parts: (rows, start) of one sequence each, whose keys are caches[i] [1, capacity, width]."""
    nothing = [np.zeros(0, cache.dtype) for cache in caches]
    spans = Spans(len(parts), caches[0].nbytes, 0)
    found, row = [], 0
    for slot, (rows, start) in enumerate(parts):
        found.append(Span(slot, row, rows, start))
        row += rows
    spans.set(found, [SlotMemory(*both) for both in zip(caches, nothing, strict=True)])
    return spans


class Stored:
    """What latent_store makes of random rows."""

    def __init__(self, kernels, rng, which, parts=((7, 3), (1, 60)), kv_dtype=np.float32):
        self.mixer, self.parts = which, parts
        width = which.kv_rank + which.rope_dim
        tokens = sum(rows for rows, _ in parts)
        self.caches = [np.full((1, CAPACITY, width), np.nan, kv_dtype) for _ in parts]
        self.q = rng.standard_normal((tokens, which.heads * (which.nope_dim + which.rope_dim) + 16))
        self.kv = rng.standard_normal((tokens, width + 8))
        self.q, self.kv = self.q.astype(np.float32), self.kv.astype(np.float32)
        self.norm = rng.standard_normal(which.kv_rank).astype(np.float32)
        self.acts = Acts.allocate(tokens, which.heads * which.nope_dim)
        self.queries = np.full((tokens, which.heads * width), np.nan, np.float32)
        rotation = None
        self.tables = rope_tables(which.rope, CAPACITY) if which.rope else None
        if self.tables is not None:
            rotation = Rotation(*self.tables, which.rope.style)
        latent_store(
            kernels,
            self.q,
            self.kv,
            which,
            self.norm,
            rotation,
            spans_of(self.caches, parts),
            cache_of(self.caches[0]),
            self.acts.by_head(which.heads),
            self.queries,
        )

    def expected(self):
        """(keys by sequence, nope [T, heads, nope_dim], rotated [T, heads, rope_dim]) in float64."""
        which = self.mixer
        positions = np.concatenate([np.arange(start, start + rows) for rows, start in self.parts])
        latent = reference.rms_norm(self.kv[:, : which.kv_rank].astype(np.float64), self.norm, 1e-5)
        shared = self.kv[:, None, which.kv_rank : which.kv_rank + which.rope_dim].astype(np.float64)
        q = self.q[:, : which.heads * (which.nope_dim + which.rope_dim)].astype(np.float64)
        q = q.reshape(len(positions), which.heads, -1)
        if which.temperature is not None:
            t = which.temperature
            q = q * (1 + t.scale * np.log(1 + (positions + t.shift) // t.period))[:, None, None]
        nope, turned = q[..., : which.nope_dim], q[..., which.nope_dim :]
        if self.tables is not None:
            cos, sin = (table[positions] for table in self.tables)
            turned, shared = (reference.rotate(x, cos, sin, which.rope) for x in (turned, shared))
        keys = np.concatenate([latent, shared[:, 0]], axis=1)
        return np.split(keys, np.cumsum([rows for rows, _ in self.parts])[:-1]), nope, turned


@pytest.mark.parametrize(
    "which",
    [
        mixer(),
        mixer("half"),
        mixer(rotates=False),
        mixer(temperature=QueryTemperature(0.4, 8, 1)),
        mixer(sizes=(32, 0, 64), rotates=False),
        mixer("half", sizes=(128, 64, 512), heads=3),
    ],
    ids=["interleaved", "half", "no rotation", "temperature", "no rope part", "large"],
)
@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
def test_store_equals_float64(kernels, rng, which, kv_dtype):
    found = Stored(kernels, rng, which, kv_dtype=kv_dtype)
    keys, nope, turned = found.expected()
    tolerance = 2e-6 if kv_dtype == np.float32 else 1e-3
    for cache, own, (rows, start) in zip(found.caches, keys, found.parts, strict=True):
        np.testing.assert_allclose(cache[0, start : start + rows], own, rtol=tolerance, atol=tolerance)
        cache[0, start : start + rows] = np.nan
        assert np.isnan(cache).all()  # nothing else was written
    queries = found.queries.reshape(*turned.shape[:2], -1)
    np.testing.assert_allclose(queries[..., which.kv_rank :], turned, rtol=2e-6, atol=2e-6)
    assert np.isnan(queries[..., : which.kv_rank]).all()
    expected = reference.quantize(nope.reshape(len(nope), -1).astype(np.float32))
    assert np.abs(found.acts.q.astype(int) - expected.q).max() <= (1 if which.temperature else 0)
    np.testing.assert_allclose(found.acts.scale, expected.scale, rtol=1e-6)
    np.testing.assert_array_equal(found.acts.sum, found.acts.q.reshape(len(nope), -1, 32).sum(-1))


def packed(kernels, rng, rows, k):
    matrix = rng.standard_normal((rows, k)).astype(np.float32)
    layout = Int8RowsLayout()
    codes, scales = np.zeros(layout.codes_shape(rows, k), np.int8), np.zeros(rows, np.float32)
    layout.pack(kernels.pool, MatrixView(matrix, "F32"), codes, scales)
    return codes, scales


@pytest.mark.parametrize("tokens", [0, 1, 2, 9, 70])
@pytest.mark.parametrize(("heads", "n", "k", "stride"), [(1, 32, 32, 32), (3, 64, 96, 80), (200, 32, 64, 32)])
def test_a_product_a_head_equals_float64(kernels, rng, tokens, heads, n, k, stride):
    codes, scales = packed(kernels, rng, heads * n, k)
    acts = Acts.allocate(tokens, heads * k)
    kernels.quantize(rng.standard_normal((tokens, heads * k)).astype(np.float32), acts)
    out = np.full((tokens, heads * stride), np.nan, np.float32)
    gemm_int8_heads(kernels, acts.by_head(heads), codes, scales, heads, out, stride)
    weight = Int8RowsLayout().unpack(codes, scales).astype(np.float64).reshape(heads, n, k)
    x = reference.QuantizedActs(acts.q, acts.scale, acts.sum).dequantized().astype(np.float64)
    expected = np.einsum("thk,hnk->thn", x.reshape(tokens, heads, k), weight)
    found = out.reshape(tokens, heads, stride)
    np.testing.assert_allclose(found[..., :n], expected, rtol=1e-5, atol=1e-4)
    assert np.isnan(found[..., n:]).all()


def attended(kernels, q, caches, parts, heads):
    tokens, longest = sum(rows for rows, _ in parts), max(rows + start for rows, start in parts)
    out = np.full((tokens, heads.output_size), np.nan, np.float32)
    scratch = workspace(attention_workspace_bytes(tokens, longest, heads))
    scratch.fill(0xFF)
    cache = cache_of(caches[0])
    kernels.attention(q, heads, spans_of(caches, parts), cache, 0.07, out, scratch)
    return out


@pytest.mark.parametrize("heads", [Heads(40, 1, 576, 512), Heads(3, 1, 128, 96), Heads(5, 1, 512, 512)])
@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
def test_attention_reads_values_out_of_the_keys(make_kernels, isa, rng, heads, kv_dtype):
    """Of several sequences, with bits that depend neither on the call's others nor on threads or width."""
    parts = ((1, 700), (70, 0), (4, 300), (2, 255))
    caches = [np.full((1, 720, heads.head_dim), np.nan, kv_dtype) for _ in parts]
    for cache, (rows, start) in zip(caches, parts, strict=True):
        cache[:, : rows + start] = rng.standard_normal((1, rows + start, heads.head_dim))
    q = rng.standard_normal((77, heads.attention_size)).astype(np.float32)
    found = attended(make_kernels(isa, 2), q, caches, parts, heads)
    assert found.tobytes() == attended(make_kernels("avx2", 1), q, caches, parts, heads).tobytes()
    row = 0
    for cache, (rows, start) in zip(caches, parts, strict=True):
        own = q[row : row + rows]
        values = cache[..., : heads.latent_values]
        expected = attention64(own.reshape(rows, heads.num_heads, -1), cache, values, start, 0.07)
        np.testing.assert_allclose(found[row : row + rows], expected, rtol=1e-4, atol=2e-5)
        alone = attended(make_kernels(isa, 2), own, [cache], ((rows, start),), heads)
        assert alone.tobytes() == found[row : row + rows].tobytes()
        row += rows


def test_what_does_not_fit_is_refused(kernels, rng):
    which = mixer()
    acts = Acts.allocate(3, which.nope_dim)
    q = np.zeros((3, which.heads * 96), np.float32)
    with pytest.raises(NativeError, match="acts do not fit"):
        latent_store(
            kernels, q, q, which, q[0, :96], None, spans_of([q[None]], ((3, 0),)), cache_of(q[None]), acts, q
        )
    codes, scales = packed(kernels, rng, 96, 32)
    acts = Acts.allocate(4, 32)
    for heads, columns in ((5, 32), (3, 16), (2, 64)):
        out = np.zeros((4 // heads, heads * columns), np.float32)
        with pytest.raises(NativeError):
            gemm_int8_heads(kernels, acts, codes, scales, heads, out, columns)
