"""krasis_stream_norm, _squash, _mix and _add against their formulas in float64; rows get the bits of calls of
their own, whatever the threads and the instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.native import Pool
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.stream_kernels import stream_add, stream_mix, stream_norm, stream_squash

Array = np.ndarray


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def streams(tokens: int, number: int, hidden: int) -> tuple[Array, ...]:
    random = np.random.default_rng(tokens + hidden)
    wide = (tokens, number * hidden)
    made = (random.standard_normal(shape) for shape in (wide, wide, (tokens, hidden), (tokens, number)))
    x, gates, added, logits = ((3 * one).astype(np.float32) for one in made)
    return x, gates, added, logits, random.standard_normal(wide[1]).astype(np.float32)


@pytest.mark.parametrize(("tokens", "number", "hidden"), [(1, 4, 64), (7, 3, 16), (150, 4, 48)])
@pytest.mark.parametrize("threads", [1, 3])
def test_formulas(tokens: int, number: int, hidden: int, threads: int) -> None:
    x, gates, added, logits, weight = streams(tokens, number, hidden)
    by_stream = x.astype(np.float64).reshape(tokens, number, hidden)
    with Pool(threads) as pool:
        kernels = Kernels(pool)
        normed, mixed, summed = np.empty_like(x), np.empty_like(added), x.copy()
        stream_norm(kernels, x, weight, 1e-2, hidden, normed)
        stream_mix(kernels, x, gates, mixed)
        stream_add(kernels, summed, added, logits)
        low = logits.copy()
        stream_squash(kernels, low, 0.25)
        rows = [np.empty((1, hidden), np.float32) for _ in range(min(tokens, 3))]
        for at, row in enumerate(rows):
            stream_mix(kernels, x[at : at + 1], gates[at : at + 1], row)
    scale = np.sqrt((by_stream**2).mean(axis=-1, keepdims=True) + 1e-2)
    expected = by_stream / scale * weight.reshape(number, hidden)
    np.testing.assert_allclose(normed, expected.reshape(x.shape), rtol=2e-6, atol=1e-6)
    opened = sigmoid(gates.astype(np.float64)).reshape(by_stream.shape)
    np.testing.assert_allclose(mixed, (opened * by_stream).mean(axis=1), rtol=2e-6, atol=2e-6)
    shares = 2 * sigmoid(logits.astype(np.float64) / number)
    np.testing.assert_allclose(
        summed, (by_stream + added[:, None] * shares[:, :, None]).reshape(x.shape), rtol=2e-6, atol=4e-6
    )
    np.testing.assert_allclose(low, logits * 0.25 * sigmoid(0.25 * logits.astype(np.float64)), rtol=2e-6)
    np.testing.assert_array_equal(np.concatenate(rows), mixed[: len(rows)])


def test_instruction_sets_and_threads_agree() -> None:
    x, gates, added, logits, weight = streams(33, 4, 64)
    found = []
    for isa, threads in (("avx2", 1), ("avx2", 4), ("auto", 2)):
        with Pool(threads, isa) as pool:
            kernels, out, mixed, summed = Kernels(pool), np.empty_like(x), np.empty_like(added), x.copy()
            stream_norm(kernels, x, weight, 1e-6, 64, out)
            stream_mix(kernels, out, gates, mixed)
            stream_add(kernels, summed, mixed, logits)
            found.append(np.concatenate([out, summed]))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_other_shapes_are_refused(kernels: Kernels) -> None:
    x = np.zeros((2, 96), np.float32)
    with pytest.raises(NativeError, match="no whole streams"):
        stream_norm(kernels, x, np.zeros(96, np.float32), 1e-6, 64, x)
    with pytest.raises(NativeError, match="no whole streams"):
        stream_mix(kernels, x, x, np.zeros((2, 24), np.float32))  # no multiple of 16
    with pytest.raises(NativeError, match=r"stream_add.logits"):
        stream_add(kernels, x, np.zeros((2, 32), np.float32), np.zeros((2, 2), np.float32))
