"""krasis_route by softmax alone: order, ties, weights. Other routers: test_routers.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.mlps import Router


def routed(kernels, logits, top_k, normalize=True):
    ids = np.full((len(logits), top_k), -7, np.int32)
    weights = np.full((len(logits), top_k), np.nan, np.float32)
    kernels.route(logits, Router(top_k=top_k, renormalise=normalize), ids, weights)
    return ids, weights


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 65, 300])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (128, 8), (5, 5), (60, 4), (512, 10)])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_torch(kernels, rng, tokens, num_experts, top_k, normalize):
    logits = (rng.standard_normal((tokens, num_experts)) * 3).astype(np.float32)
    ids, weights = routed(kernels, logits, top_k, normalize)
    wide = torch.softmax(torch.from_numpy(logits).double(), dim=-1)
    want, places = torch.topk(wide, top_k, dim=-1)
    if normalize:
        want = want / want.sum(dim=-1, keepdim=True)
    np.testing.assert_array_equal(ids, places.numpy())
    np.testing.assert_allclose(weights, want.numpy(), rtol=1e-5)


def test_ties_go_to_the_lower_id(kernels):
    logits = np.zeros((3, 40), np.float32)
    logits[1, [30, 17, 39]] = 2.0
    logits[2, 39] = 1.0
    ids, weights = routed(kernels, logits, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [17, 30, 39, 0], [39, 0, 1, 2]]
    assert weights[0].tolist() == [0.25] * 4
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)


def test_extreme_logits(kernels):
    logits = np.full((2, 20), -1e30, np.float32)
    logits[0, 19] = 1e30
    logits[1, 3] = -np.inf
    ids, weights = routed(kernels, logits, 3, normalize=False)
    assert ids.tolist() == [[19, 0, 1], [0, 1, 2]]
    assert weights[0].tolist() == [1, 0, 0]
    np.testing.assert_allclose(weights[1], 1 / 19, rtol=1e-6)


def test_nan_logits_give_valid_ids_and_nan_weights(kernels):
    logits = np.zeros((1, 32), np.float32)
    logits[0, 4] = np.nan
    ids, weights = routed(kernels, logits, 4)
    assert sorted(set(ids[0].tolist())) == sorted(ids[0].tolist())
    assert ((ids >= 0) & (ids < 32)).all()
    assert np.isnan(weights).all()


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_same_bits_for_any_threads_batch_and_isa(make_kernels, isa, rng, threads):
    logits = rng.standard_normal((300, 128)).astype(np.float32)
    ids, weights = routed(make_kernels(isa, threads), logits, 8)
    one_ids, one_weights = routed(make_kernels("avx2", 1), logits[299:], 8)
    assert one_ids.tobytes() == ids[299].tobytes()
    assert one_weights.tobytes() == weights[299].tobytes()


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 5), (5000, 2)])
def test_refuses(kernels, num_experts, top_k):
    with pytest.raises(NativeError, match="krasis_route"):
        routed(kernels, np.zeros((1, num_experts), np.float32), top_k)
