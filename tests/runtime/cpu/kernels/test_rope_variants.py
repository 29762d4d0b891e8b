"""Biases, flat norms, cutting, partial and interleaved rotations of krasis_qk_norm_rope_store, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from sequences import place

from krasis.runtime.cpu.heads import Heads, QkNorms, Rotation

EPS, CAPACITY, START, ROWS = 1e-5, 60, 7, 9


@dataclass(frozen=True)
class Variant:
    norm: str | None = None
    has_bias: bool = False
    clip: float | None = None
    rotary_dims: int = 32
    style: str = "half"
    shape: tuple[int, int, int] = (4, 2, 32)
    shared_kv: bool = False
    value_norm: bool = False


VARIANTS = {
    "qwen2_moe": Variant(has_bias=True),
    "olmoe": Variant(norm="flat", clip=1.5),
    "glm4_moe": Variant(norm="head", has_bias=True, rotary_dims=64, shape=(12, 1, 128)),
    "minimax_m2": Variant(norm="flat", rotary_dims=64, shape=(6, 2, 128)),
    "ernie": Variant(style="interleaved"),
    "flat with bias": Variant(norm="flat", has_bias=True),
    "interleaved and partial": Variant(norm="head", rotary_dims=12, style="interleaved"),
    "odd halves": Variant(norm="head", rotary_dims=20, shape=(2, 1, 48)),
    "hunyuan": Variant(norm="head_after_rope"),
    "partial, neighbours, norms after": Variant(norm="head_after_rope", rotary_dims=12, style="interleaved"),
    "two channels": Variant(rotary_dims=2, clip=0.5),
    "gemma4": Variant(norm="head", rotary_dims=512, shape=(4, 2, 512), shared_kv=True, value_norm=True),
    "normed values": Variant(norm="head", shape=(8, 4, 64), value_norm=True),
    "keys as values": Variant(has_bias=True, clip=1.0, shared_kv=True),
    "no rotation": Variant(norm="head", has_bias=True, clip=1.0, rotary_dims=0),
}


class Case:
    def __init__(self, rng, variant: Variant, kv_dtype=np.float32):
        self.variant, self.heads = variant, Heads(*variant.shape, shared_kv=variant.shared_kv)
        heads, dim = self.heads, variant.shape[2]
        self.qkv = rng.standard_normal((ROWS, heads.qkv_size)).astype(np.float32)
        self.bias = rng.standard_normal(heads.qkv_size).astype(np.float32) if variant.has_bias else None
        self.norms = None
        if variant.norm is not None:
            sizes = [n * dim if variant.norm == "flat" else dim for n in variant.shape[:2]]
            weights = [rng.uniform(0.5, 2, size).astype(np.float32) for size in sizes]
            self.norms = QkNorms(*weights, EPS, variant.norm)
        self.rotation = None
        if variant.rotary_dims:
            angles = rng.uniform(0, 6, (CAPACITY, variant.rotary_dims // 2))
            tables = np.cos(angles) * 1.3, np.sin(angles) * 1.3
            self.rotation = Rotation(*(table.astype(np.float32) for table in tables), variant.style)
        shape = (heads.num_kv_heads, CAPACITY, dim)
        self.k_cache, self.v_cache = (np.full(shape, 77, kv_dtype) for _ in range(2))

    def run(self, kernels, qkv, start=START):
        spans, cache = place(self.k_cache, self.v_cache, start, len(qkv))
        clip = self.variant.clip
        more = (self.rotation, self.norms, self.bias, clip, self.variant.value_norm)
        kernels.qk_norm_rope_store(qkv, self.heads, spans, cache, *more)
        return qkv

    def expected(self):
        """q, k, v [ROWS, heads, head_dim] in float64."""
        heads, (num_heads, num_kv_heads, dim) = self.heads, self.variant.shape
        x = self.qkv.astype(np.float64) + (0 if self.bias is None else self.bias)
        split = np.cumsum([num_heads * dim, num_kv_heads * dim])
        assert split[1] + (0 if self.variant.shared_kv else num_kv_heads * dim) == heads.qkv_size
        q, k, v = np.split(x, split, axis=1)
        v = k if self.variant.shared_kv else v
        after = self.variant.norm == "head_after_rope"
        if self.norms is not None and not after:
            q, k = self.normed(q, self.norms.q), self.normed(k, self.norms.k)
        if self.variant.clip is not None:
            q, k, v = (np.clip(part, -self.variant.clip, self.variant.clip) for part in (q, k, v))
        q, k, v = (part.reshape(ROWS, -1, dim) for part in (q, k, v))
        if self.variant.value_norm:
            v = v / np.sqrt((v**2).mean(axis=-1, keepdims=True) + EPS)
        q, k = self.rotated(q), self.rotated(k)
        if after:
            q, k = self.normed(q, self.norms.q), self.normed(k, self.norms.k)
        return q, k, v

    def normed(self, x, weight):
        parts = x if self.variant.norm == "flat" else x.reshape(ROWS, -1, self.variant.shape[2])
        y = parts / np.sqrt((parts**2).mean(axis=-1, keepdims=True) + EPS) * weight
        return y.reshape(x.shape)

    def rotated(self, x):
        if self.rotation is None:
            return x
        n, y = self.variant.rotary_dims, x.copy()
        pairs = (slice(0, n // 2), slice(n // 2, n))
        if self.variant.style == "interleaved":
            pairs = (slice(0, n, 2), slice(1, n, 2))
        cos, sin = (
            t[START : START + ROWS, None].astype(np.float64) for t in (self.rotation.cos, self.rotation.sin)
        )
        a, b = x[..., pairs[0]], x[..., pairs[1]]
        y[..., pairs[0]], y[..., pairs[1]] = a * cos - b * sin, b * cos + a * sin
        return y


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
def test_equals_float64(kernels, rng, name, kv_dtype):
    case = Case(rng, VARIANTS[name], kv_dtype)
    q, k, v = case.expected()
    got = case.run(kernels, case.qkv.copy())
    size = case.heads.attention_size
    np.testing.assert_allclose(got[:, :size].reshape(q.shape), q, rtol=3e-6, atol=3e-6)
    tolerance = 3e-6 if kv_dtype is np.float32 else 2e-3
    places = slice(START, START + ROWS)
    for cache, want in ((case.k_cache, k), (case.v_cache, v)):
        np.testing.assert_allclose(cache[:, places].transpose(1, 0, 2), want, rtol=tolerance, atol=tolerance)
        assert (cache[:, :START] == 77).all()
        assert (cache[:, START + ROWS :] == 77).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_same_bits_for_any_threads_batch_and_isa(make_kernels, isa, rng, name):
    case = Case(rng, VARIANTS[name])
    whole = case.run(make_kernels(isa, 4), case.qkv.copy())
    keys, values = case.k_cache.copy(), case.v_cache.copy()
    for row in range(ROWS):
        own = case.run(make_kernels("avx2", 1), case.qkv[row : row + 1].copy(), START + row)
        assert own.tobytes() == whole[row : row + 1].tobytes()
    assert case.k_cache.tobytes() == keys.tobytes()
    assert case.v_cache.tobytes() == values.tobytes()


def test_clipping_lets_a_nan_through(kernels, rng):
    """A broken weight must show, not be cut to a number."""
    case = Case(rng, VARIANTS["two channels"])
    case.qkv[3, 5] = np.nan
    case.qkv[3, -5] = np.nan
    got = case.run(kernels, case.qkv.copy())
    assert np.isnan(got[3, 5])
    assert np.isnan(case.v_cache[-1, START + 3, -5])
