"""krasis_qk_norm_rope_store against float64, and against transformers' Qwen3-MoE functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from sequences import place

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.heads import Heads, QkNorms, Rotation

EPS = 1e-6
CAPACITY = 400


@dataclass
class Case:
    heads: Heads
    start: int
    qkv: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray

    @classmethod
    def make(cls, rng, tokens, start, heads, kv_dtype=np.float32):
        dim = heads.head_dim
        angles = np.arange(CAPACITY)[:, None] * 10000.0 ** (-np.arange(dim // 2) * 2 / dim)
        caches = [np.full((heads.num_kv_heads, CAPACITY, dim), 77, kv_dtype) for _ in range(2)]
        norms = [(1 + rng.standard_normal(dim) / 4).astype(np.float32) for _ in range(2)]
        qkv = rng.standard_normal((tokens, heads.qkv_size)).astype(np.float32)
        return cls(
            heads,
            start,
            qkv,
            *norms,
            np.cos(angles).astype(np.float32),
            np.sin(angles).astype(np.float32),
            *caches,
        )

    def run(self, kernels, norm=True):
        norms = QkNorms(self.q_norm, self.k_norm, EPS) if norm else None
        spans, cache = place(self.k_cache, self.v_cache, self.start, len(self.qkv))
        rotation = Rotation(self.cos, self.sin)
        kernels.qk_norm_rope_store(self.qkv, self.heads, spans, cache, rotation, norms)
        return self

    def expected(self, norm=True):
        """q, k, v [T, heads, D] in float64."""
        heads, tokens = self.heads, len(self.qkv)
        x = self.qkv.astype(np.float64).reshape(tokens, self.qkv.shape[1] // heads.head_dim, heads.head_dim)
        positions = slice(self.start, self.start + tokens)
        rotation = (self.cos[positions] + 1j * self.sin[positions])[:, None, :]
        out = []
        last = heads.num_heads + heads.num_kv_heads
        for part, weight in (
            (x[:, : heads.num_heads], self.q_norm),
            (x[:, heads.num_heads : last], self.k_norm),
        ):
            y = part / np.sqrt((part**2).mean(axis=-1, keepdims=True) + EPS) * weight if norm else part
            half = heads.head_dim // 2
            turned = (y[..., :half] + 1j * y[..., half:]) * rotation
            out.append(np.concatenate([turned.real, turned.imag], axis=-1))
        return (*out, x[:, last:])


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 65, 300])
@pytest.mark.parametrize("shape", [(8, 1, 128), (4, 2, 64), (2, 2, 80), (1, 1, 16), (4, 4, 256)])
@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
def test_equals_float64(kernels, rng, tokens, shape, kv_dtype):
    case = Case.make(rng, tokens, 0 if tokens == 300 else 13, Heads(*shape), kv_dtype)
    before = case.qkv.copy()
    q, k, v = case.expected()
    case.run(kernels)
    split = case.heads.attention_size
    np.testing.assert_allclose(case.qkv[:, :split], q.reshape(tokens, split), rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(case.qkv[:, split:], before[:, split:])
    end = case.start + tokens
    tolerance = 2e-6 if kv_dtype is np.float32 else 1e-3
    np.testing.assert_allclose(
        case.k_cache[:, case.start : end], k.transpose(1, 0, 2), rtol=tolerance, atol=tolerance
    )
    np.testing.assert_array_equal(case.v_cache[:, case.start : end], v.transpose(1, 0, 2).astype(kv_dtype))
    for cache in (case.k_cache, case.v_cache):
        assert (cache[:, : case.start] == 77).all()
        assert (cache[:, end:] == 77).all()


def test_without_norms(kernels, rng):
    case = Case.make(rng, 7, 3, Heads(4, 2, 64))
    q, k, _ = case.expected(norm=False)
    case.run(kernels, norm=False)
    np.testing.assert_allclose(case.qkv[:, :256], q.reshape(7, -1), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(case.k_cache[:, 3:10], k.transpose(1, 0, 2), rtol=2e-6, atol=2e-6)


def test_equals_transformers(kernels, rng):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    case = Case.make(rng, 9, 5, Heads(4, 2, 64))
    x = torch.from_numpy(case.qkv.copy()).view(9, 8, 64)
    tables = []
    for table in (case.cos, case.sin):
        own = torch.from_numpy(table[5:14])
        tables.append(torch.cat([own, own], dim=-1)[None])
    normed = []
    for part, weight in ((x[:, :4], case.q_norm), (x[:, 4:6], case.k_norm)):
        layer = modeling.Qwen3MoeRMSNorm(64, EPS)
        layer.weight.data = torch.from_numpy(weight)
        normed.append(layer(part).transpose(0, 1)[None])  # [1, heads, T, D]
    q, k = modeling.apply_rotary_pos_emb(*normed, *tables)
    case.run(kernels)
    np.testing.assert_allclose(
        case.qkv[:, :256].reshape(9, 4, 64), q[0].transpose(0, 1).detach().numpy(), rtol=2e-6, atol=2e-6
    )
    np.testing.assert_allclose(case.k_cache[:, 5:14], k[0].detach().numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_same_bits_for_any_threads_batch_and_isa(make_kernels, isa, rng, threads):
    case = Case.make(rng, 300, 20, Heads(8, 2, 128), np.float16)
    fresh = case.qkv.copy()
    case.run(make_kernels(isa, threads))
    for token in (0, 150, 299):
        alone = Case.make(rng, 1, 20 + token, case.heads, np.float16)
        alone.qkv[:], alone.q_norm, alone.k_norm = fresh[token], case.q_norm, case.k_norm
        alone.run(make_kernels("avx2", 1))
        assert alone.qkv.tobytes() == case.qkv[token].tobytes()
        place = slice(20 + token, 21 + token)
        assert alone.k_cache[:, place].tobytes() == case.k_cache[:, place].tobytes()
        assert alone.v_cache[:, place].tobytes() == case.v_cache[:, place].tobytes()


@pytest.mark.parametrize(("start", "tokens"), [(CAPACITY, 1), (CAPACITY - 1, 2)])
def test_refuses_positions_outside_the_cache(kernels, rng, start, tokens):
    case = Case.make(rng, tokens, start, Heads(2, 1, 32))
    with pytest.raises(NativeError, match="krasis_qk_norm_rope_store"):
        case.run(kernels)
    assert (case.k_cache == 77).all()


@pytest.mark.parametrize("shape", [(2, 1, 24), (2, 1, 528), (3, 2, 32)])
def test_refuses_shapes(kernels, rng, shape):
    with pytest.raises(NativeError, match="krasis_qk_norm_rope_store"):
        Case.make(rng, 1, 0, Heads(*shape)).run(kernels)
