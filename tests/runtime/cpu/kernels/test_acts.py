"""krasis_quantize_acts against NumPy: exact in q, scale and sum."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.runtime.cpu.kernels import Acts


def quantized(kernels, x):
    acts = Acts.allocate(len(x), x.shape[1])
    acts.q[:], acts.scale[:], acts.sum[:] = 99, np.nan, -99
    kernels.quantize(x, acts)
    return acts


def expected(x):
    """q, scale, sum by the definition, with IEEE float32 operations throughout."""
    blocks = x.reshape(len(x), x.shape[1] // 32, 32)
    scale = np.abs(blocks).max(axis=2) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(scale[..., None] > 0, np.rint(blocks / scale[..., None]), 0)
    q = np.clip(q, -127, 127).astype(np.int64)
    return q.reshape(x.shape), scale, q.sum(axis=2)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 64, 65, 300])
@pytest.mark.parametrize("k", [32, 96, 1024])
def test_equals_the_definition(kernels, rng, tokens, k):
    x = (rng.standard_normal((tokens, k)) * rng.lognormal(0, 3, (tokens, k))).astype(np.float32)
    acts = quantized(kernels, x)
    q, scale, sums = expected(x)
    np.testing.assert_array_equal(acts.q, q)
    np.testing.assert_array_equal(acts.scale, scale)
    np.testing.assert_array_equal(acts.sum, sums)


def test_error_is_half_a_step(kernels, rng):
    x = rng.standard_normal((5, 4096)).astype(np.float32)
    acts = quantized(kernels, x)
    steps = np.repeat(acts.scale.astype(np.float64), 32, axis=1)
    assert np.all(np.abs(x - acts.q * steps) <= steps * 0.500001)
    assert np.abs(acts.q.astype(int)).max() == 127


@pytest.mark.parametrize(
    ("values", "q"),
    [
        ([0.0, -0.0], [0, 0]),
        ([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5], [127, 0, 2, 2, 0, -2, 126]),
        ([1e30, 1.0, -1e30], [127, 0, -127]),
        ([3.4e38, -3.4e38], [127, -127]),
        ([1.4e-45], [0]),  # the scale underflows to zero
    ],
)
def test_edge_values(kernels, values, q):
    x = np.zeros((1, 64), np.float32)
    x[0, 32 : 32 + len(values)] = values
    acts = quantized(kernels, x)
    assert acts.q[0, 32 : 32 + len(values)].tolist() == q
    assert not acts.q[0, :32].any()
    assert acts.scale[0, 0] == 0
    assert acts.sum[0].tolist() == [0, sum(q)]


@pytest.mark.parametrize("units", [64, 100, 190, 191, 5000])
def test_denormal_steps_stay_within_127(kernels, units):
    smallest = np.float32(1.4e-45)
    x = np.full((1, 32), smallest * np.float32(units))
    x[0, ::2] *= -1
    acts = quantized(kernels, x)
    np.testing.assert_array_equal(acts.q, expected(x)[0])
    assert np.abs(acts.q.astype(int)).max() <= 127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 13, 31])
def test_non_finite_input_shows_in_the_scale(kernels, bad, place):
    x = np.ones((1, 64), np.float32)
    x[0, place] = bad
    acts = quantized(kernels, x)
    assert not np.isfinite(acts.scale[0, 0])
    assert acts.scale[0, 1] == np.float32(1) / np.float32(127)
    assert np.abs(acts.q.astype(int)).max() <= 127


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_same_bits_for_any_threads_and_batch(make_kernels, isa, rng, threads):
    x = rng.standard_normal((300, 512)).astype(np.float32)
    together = quantized(make_kernels(isa, threads), x)
    for row in (0, 7, 299):
        alone = quantized(make_kernels("avx2", 1), x[row : row + 1])
        assert alone.q.tobytes() == together.q[row].tobytes()
        assert alone.scale.tobytes() == together.scale[row].tobytes()
        assert alone.sum.tobytes() == together.sum[row].tobytes()
