"""krasis_rms_norm against float64."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.runtime.cpu.kernels import Acts

EPS = 1e-6


def expected(x, weight):
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).sum(axis=1, keepdims=True) / x.shape[1] + EPS) * weight


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 64, 65, 300])
@pytest.mark.parametrize("k", [1, 8, 33, 64, 100, 2048])
def test_equals_float64(kernels, rng, tokens, k):
    x, weight = rng.standard_normal((tokens, k)).astype(np.float32), rng.standard_normal(k).astype(np.float32)
    out = np.full((tokens, k), np.nan, np.float32)
    kernels.rms_norm(x, weight, EPS, out)
    np.testing.assert_allclose(out, expected(x, weight), rtol=1e-6, atol=1e-7)


def test_acts_are_the_quantised_result(kernels, rng):
    x, weight = rng.standard_normal((65, 256)).astype(np.float32), rng.standard_normal(256).astype(np.float32)
    out, alone, both = np.empty_like(x), Acts.allocate(65, 256), Acts.allocate(65, 256)
    kernels.rms_norm(x, weight, EPS, out, both)
    np.testing.assert_allclose(out, expected(x, weight), rtol=1e-6, atol=1e-7)
    kernels.rms_norm(x, weight, EPS, acts=alone)
    again = Acts.allocate(65, 256)
    kernels.quantize(out, again)
    for acts in (alone, both):
        assert acts.q.tobytes() == again.q.tobytes()
        assert acts.scale.tobytes() == again.scale.tobytes()
        assert acts.sum.tobytes() == again.sum.tobytes()


def test_in_place(kernels, rng):
    x, weight = rng.standard_normal((3, 96)).astype(np.float32), rng.standard_normal(96).astype(np.float32)
    out = np.empty_like(x)
    kernels.rms_norm(x, weight, EPS, out)
    kernels.rms_norm(x, weight, EPS, x)
    assert x.tobytes() == out.tobytes()


def test_zero_row_and_huge_row(kernels):
    x = np.zeros((2, 64), np.float32)
    x[1, 5] = 1e15
    out = np.empty_like(x)
    kernels.rms_norm(x, np.ones(64, np.float32), EPS, out)
    assert not out[0].any()
    np.testing.assert_allclose(out[1, 5], 8.0, rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_same_bits_for_any_threads_batch_and_isa(make_kernels, isa, rng, threads):
    x, weight = (
        rng.standard_normal((300, 512)).astype(np.float32),
        rng.standard_normal(512).astype(np.float32),
    )
    out = np.empty_like(x)
    make_kernels(isa, threads).rms_norm(x, weight, EPS, out)
    one = np.empty((1, 512), np.float32)
    for row in (0, 31, 32, 299):
        make_kernels("avx2", 1).rms_norm(x[row : row + 1], weight, EPS, one)
        assert one.tobytes() == out[row].tobytes()
