"""krasis_hyper_weights, _sum and _add: their NumPy twin has the numbers of transformers' own module, and they
those of the twin in float64; rows get the bits of calls of their own, whatever threads and instruction set.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.models.spec import Residual
from krasis.formats.native import Pool
from krasis.runtime.cpu import float_hyper
from krasis.runtime.cpu.hyper_kernels import hyper_add, hyper_sum, hyper_weights
from krasis.runtime.cpu.kernels import Kernels

Array = np.ndarray
NORM_EPS, EPS = 1e-3, 1e-4


def problem(tokens: int, streams: int, hidden: int, rounds: int = 20) -> tuple[Residual, dict[str, Array]]:
    random = np.random.default_rng(tokens + streams)
    n, wide = (2 + streams) * streams, streams * hidden
    shapes = {"x": (tokens, wide), "added": (tokens, hidden), "fn": (n, wide), "base": (n,), "scale": (3,)}
    made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    made["fn"] *= np.float32(3 * wide**-0.5)
    return Residual("hyper", streams, "mean", rounds=rounds, eps=EPS), made


def of_kernels(kernels: Kernels, residual: Residual, given: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Weights, what a block reads, and the streams afterwards."""
    x, hidden = given["x"].copy(), given["added"].shape[1]
    mixes = np.empty((len(x), len(given["base"])), np.float32)
    mixed = np.empty_like(given["added"])
    kernels.gemm_float(x, given["fn"], mixes)
    arguments = given["scale"], given["base"]
    settings = {"norm_eps": NORM_EPS, "eps": residual.eps, "rounds": residual.rounds}
    hyper_weights(kernels, x, mixes, hidden, *arguments, **settings)
    hyper_sum(kernels, x, mixes, mixed)
    hyper_add(kernels, x, given["added"], mixes)
    return mixes, mixed, x


def test_the_twin_has_the_numbers_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    residual, given = problem(9, 4, 32)
    config = SimpleNamespace(
        hc_mult=4, hc_sinkhorn_iters=20, hc_eps=EPS, rms_norm_eps=NORM_EPS, hidden_size=32
    )
    module = DeepseekV4HyperConnection(config).double()
    exact = {name: one.astype(np.float64) for name, one in given.items()}
    with torch.no_grad():
        for name in ("fn", "base", "scale"):
            getattr(module, name).copy_(torch.from_numpy(exact[name]))
        streams = torch.from_numpy(exact["x"]).reshape(1, 9, 4, 32)
        post, comb, mixed = (one[0].numpy() for one in module.float()(streams.float()))
    vectors = float_hyper.HyperVectors(exact["fn"], exact["base"], exact["scale"])
    pre, own_post, own_comb = float_hyper.hyper_weights(exact["x"], vectors, residual, NORM_EPS)
    np.testing.assert_allclose(own_post, post, rtol=1e-5)
    np.testing.assert_allclose(own_comb, comb, rtol=1e-5)
    own_mixed = np.einsum("ts,tsk->tk", pre, exact["x"].reshape(9, 4, 32))
    np.testing.assert_allclose(own_mixed, mixed, rtol=1e-4, atol=1e-6)
    assert not np.allclose(own_comb, own_comb.swapaxes(1, 2), rtol=0.1)  # else its direction is not tested


@pytest.mark.parametrize(("tokens", "streams", "hidden"), [(1, 4, 64), (7, 3, 16), (150, 4, 48), (2, 1, 32)])
@pytest.mark.parametrize("threads", [1, 3])
def test_formulas(tokens: int, streams: int, hidden: int, threads: int) -> None:
    residual, given = problem(tokens, streams, hidden)
    with Pool(threads) as pool:
        mixes, mixed, after = of_kernels(Kernels(pool), residual, given)
    exact = {name: one.astype(np.float64) for name, one in given.items()}
    vectors = float_hyper.HyperVectors(exact["fn"], exact["base"], exact["scale"])
    pre, post, comb = float_hyper.hyper_weights(exact["x"], vectors, residual, NORM_EPS)
    expected = np.concatenate([pre, post, comb.reshape(tokens, -1)], axis=1)
    np.testing.assert_allclose(mixes, expected, rtol=1e-5, atol=1e-6)
    by_stream = exact["x"].reshape(tokens, streams, hidden)
    np.testing.assert_allclose(mixed, np.einsum("ts,tsk->tk", pre, by_stream), rtol=1e-5, atol=1e-5)
    whole = post[:, :, None] * exact["added"][:, None] + np.einsum("tjs,tjk->tsk", comb, by_stream)
    np.testing.assert_allclose(after, whole.reshape(after.shape), rtol=1e-5, atol=1e-5)


def test_an_end_with_weights_of_its_own_and_a_mean(kernels: Kernels) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead

    _, given = problem(11, 4, 32)
    x, fn, base, scale = (
        given["x"],
        given["fn"][:4].copy(),
        given["base"][:4].copy(),
        given["scale"][:1].copy(),
    )
    module = DeepseekV4HyperHead(
        SimpleNamespace(hc_mult=4, hc_eps=EPS, rms_norm_eps=NORM_EPS, hidden_size=32)
    )
    with torch.no_grad():
        for parameter, values in ((module.hc_fn, fn), (module.hc_base, base), (module.hc_scale, scale)):
            parameter.copy_(torch.from_numpy(values))
        expected = module(torch.from_numpy(x).reshape(1, 11, 4, 32))[0].numpy()
    mixes, out = np.empty((11, 4), np.float32), np.empty((11, 32), np.float32)
    kernels.gemm_float(x, fn, mixes)
    hyper_weights(kernels, x, mixes, 32, scale, base, norm_eps=NORM_EPS, eps=EPS, rounds=0)
    hyper_sum(kernels, x, mixes, out)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    hyper_sum(kernels, x, np.full((1, 4), 0.25, np.float32), out)
    np.testing.assert_allclose(out, x.reshape(11, 4, 32).mean(axis=1), rtol=1e-5, atol=1e-6)


def test_rows_threads_and_instruction_sets_agree() -> None:
    residual, given = problem(33, 4, 64)
    found = []
    for isa, threads in (("avx2", 1), ("avx2", 4), ("auto", 2)):
        with Pool(threads, isa) as pool:
            kernels = Kernels(pool)
            found.append(np.concatenate(of_kernels(kernels, residual, given), axis=1))
            one = given | {name: given[name][5:6].copy() for name in ("x", "added")}
            alone = np.concatenate(of_kernels(kernels, residual, one), axis=1)
        np.testing.assert_array_equal(alone[0], found[-1][5])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_other_shapes_are_refused(kernels: Kernels) -> None:
    _, given = problem(2, 4, 32)
    x, mixes = given["x"], np.zeros((2, 24), np.float32)
    settings = {"norm_eps": NORM_EPS, "eps": EPS, "rounds": 2}
    with pytest.raises(NativeError, match="no whole streams"):
        hyper_weights(kernels, x, mixes, 48, given["scale"], given["base"], **settings)
    with pytest.raises(NativeError, match=r"hyper_weights.scale"):
        hyper_weights(kernels, x, mixes, 32, given["scale"][:2].copy(), given["base"], **settings)
    with pytest.raises(NativeError):  # neither all weights nor those of an end
        hyper_weights(
            kernels, x, np.zeros((2, 8), np.float32), 32, given["scale"], np.zeros(8, np.float32), **settings
        )
    with pytest.raises(NativeError, match="too few shares"):
        hyper_sum(kernels, x, np.zeros((2, 3), np.float32), np.zeros((2, 32), np.float32))
    with pytest.raises(NativeError, match=r"hyper_add.weights"):
        hyper_add(kernels, x, given["added"], np.zeros((2, 20), np.float32))
