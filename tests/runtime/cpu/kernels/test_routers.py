"""krasis_route for every kind of router, against the formulas in float64 and transformers' own routers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.mlps import Router

EXPERTS = 32
ROUTERS = {
    "softmax, scaled": Router(top_k=4, renormalise=False, scale=2.5),
    "softmax with a bias": Router(top_k=4, bias=True),
    "ernie": Router(top_k=4, correction_bias=True, sum_floor=0.3),
    "deepseek_v2": Router(top_k=6, renormalise=False, groups=8, top_groups=3, group_score="best"),
    "glm4_moe": Router(top_k=8, score="sigmoid", correction_bias=True, sum_epsilon=1e-20, scale=2.5),
    "deepseek_v3": Router(
        top_k=8, score="sigmoid", correction_bias=True, groups=8, top_groups=4, sum_epsilon=1e-20, scale=2.5
    ),
    "groups of one": Router(top_k=3, score="sigmoid", groups=32, top_groups=5),
    "minimax_m2": Router(top_k=8, score="sigmoid", correction_bias=True),
    "gpt_oss": Router(top_k=4, score="softmax_of_top", renormalise=False, bias=True),
    "llama4": Router(top_k=1, score="sigmoid_of_top", renormalise=False),
    "deepseek_v4": Router(top_k=6, score="sqrt_softplus", correction_bias=True, scale=1.5),
    "capped": Router(top_k=4, logit_cap=3.0, expert_scale=True),
    "everything": Router(
        top_k=5, score="sigmoid", correction_bias=True, bias=True, logit_cap=5.0, groups=4, top_groups=2,
        sum_floor=0.1, sum_epsilon=0.01, scale=0.7, expert_scale=True,
    ),
}  # fmt: skip


def parts_of(rng, router):
    """bias, correction_bias and expert_scale, as far as the router has them."""
    made = {
        "bias": rng.standard_normal(EXPERTS),
        "correction_bias": rng.standard_normal(EXPERTS) / 3,
        "expert_scale": rng.uniform(0.5, 2, EXPERTS),
    }
    return {name: part.astype(np.float32) for name, part in made.items() if getattr(router, name)}


def routed(kernels, logits, router, parts):
    ids = np.full((len(logits), router.top_k), -7, np.int32)
    weights = np.full((len(logits), router.top_k), np.nan, np.float32)
    kernels.route(logits, router, ids, weights, **parts)
    return ids, weights


def scores_of(score, logits):
    if score == "softmax":
        e = np.exp(logits - logits.max())
        return e / e.sum()
    if score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    if score == "sqrt_softplus":
        return np.sqrt(np.logaddexp(0, logits))
    return logits


def expected(router, logits, bias=0.0, correction_bias=0.0, expert_scale=None):
    """ids and float64 weights of one row."""
    logits = logits.astype(np.float64) + bias
    if router.logit_cap is not None:
        logits = router.logit_cap * np.tanh(logits / router.logit_cap)
    scores = scores_of(router.score, logits)
    choice = scores + correction_bias
    if router.groups > 1:
        groups = np.sort(choice.reshape(router.groups, -1), axis=1)[:, ::-1]
        best = groups[:, : 2 if router.group_score == "best_two" else 1].sum(axis=1)
        kept = np.argsort(-best, kind="stable")[: router.top_groups]
        hidden = ~np.isin(np.arange(len(choice)) // (len(choice) // router.groups), kept)
        choice = np.where(hidden, -np.inf, choice)
    ids = np.argsort(-choice, kind="stable")[: router.top_k]
    weights = scores[ids]
    if router.score.endswith("_of_top"):
        weights = scores_of(router.score.removesuffix("_of_top"), weights)
    if router.renormalise:
        weights = weights / (max(weights.sum(), router.sum_floor) + router.sum_epsilon)
    weights = weights * router.scale
    return ids, weights if expert_scale is None else weights * expert_scale[ids]


@pytest.mark.parametrize("name", ROUTERS)
def test_equals_float64(kernels, rng, name):
    router = ROUTERS[name]
    parts = parts_of(rng, router)
    logits = (rng.standard_normal((300, EXPERTS)) * rng.choice([0.05, 1, 5], (300, 1))).astype(np.float32)
    ids, weights = routed(kernels, logits, router, parts)
    for row in range(300):
        want_ids, want = expected(router, logits[row], **parts)
        assert ids[row].tolist() == want_ids.tolist()
        np.testing.assert_allclose(weights[row], want, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("threads", [1, 4])
def test_same_bits_for_any_threads_batch_and_isa(make_kernels, isa, rng, name, threads):
    router = ROUTERS[name]
    parts = parts_of(rng, router)
    logits = (rng.standard_normal((700, EXPERTS)) * 4).astype(np.float32)
    ids, weights = routed(make_kernels(isa, threads), logits, router, parts)
    for row in (0, 350, 699):
        one_ids, one = routed(make_kernels("avx2", 1), logits[row : row + 1], router, parts)
        assert one_ids.tobytes() == ids[row].tobytes()
        assert one.tobytes() == weights[row].tobytes()


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "deepseek_v2", "deepseek_v4"])
def test_ties_go_to_the_lower_id(kernels, name):
    router = replace(ROUTERS[name], bias=False, correction_bias=False)
    ids, weights = routed(kernels, np.zeros((2, EXPERTS), np.float32), router, {})
    assert ids[0].tolist() == list(range(router.top_k))
    assert len(set(weights[0].tolist())) == 1


def test_groups_are_taken_whole(kernels):
    """The best expert is lost where its group is not among the best; lower groups win ties."""
    logits = np.full((1, EXPERTS), -4.0, np.float32)
    logits[0, 9] = 5.0  # group 1, alone
    logits[0, [16, 17, 24, 25]] = 3.0  # groups 2 and 3, two each
    router = Router(top_k=4, score="sigmoid", groups=4, top_groups=2)
    assert routed(kernels, logits, router, {})[0].tolist() == [[16, 17, 24, 25]]
    best = replace(router, group_score="best")
    assert routed(kernels, logits, best, {})[0].tolist() == [[9, 16, 17, 8]]


def test_extreme_logits(kernels):
    logits = np.array([[-np.inf, -1e30, -200, -90, 0, 90, 200, 1e30]], np.float32)
    for score in ("sigmoid", "sqrt_softplus"):
        router = Router(top_k=8, score=score, renormalise=False)
        ids, weights = routed(kernels, logits, router, {})
        assert ids[0, -4:].tolist() == ([0, 1, 2, 3] if score == "sqrt_softplus" else ids[0, -4:].tolist())
        want = {"sigmoid": [1, 1, 1], "sqrt_softplus": [1e15, 200**0.5, 90**0.5]}[score]
        np.testing.assert_allclose(np.sort(weights[0])[::-1][:3], want, rtol=1e-6)
        assert np.isfinite(weights).all()
    capped = Router(top_k=8, score="sigmoid", renormalise=False, logit_cap=2.0)
    weights = routed(kernels, logits, capped, {})[1]
    np.testing.assert_allclose(weights[0, [0, -1]], 1 / (1 + np.exp([-2.0, 2.0])), rtol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_nan_logits_give_valid_ids_and_show(kernels, rng, name):
    router = ROUTERS[name]
    ids, weights = routed(kernels, np.full((1, EXPERTS), np.nan, np.float32), router, parts_of(rng, router))
    assert len(set(ids[0].tolist())) == router.top_k
    assert ((ids >= 0) & (ids < EXPERTS)).all()
    assert np.isnan(weights).all()


def test_small_capped_logits_keep_their_digits(kernels):
    """cap tanh(x / cap) near 0 is x: not a difference of numbers near 1."""
    logits = np.array([[1e-6, 2e-6, 3e-3, 0.2]], np.float32)
    router = Router(top_k=4, score="sigmoid_of_top", renormalise=False, logit_cap=1.0)
    choice = Router(top_k=4, score="softmax_of_top", renormalise=False, logit_cap=1.0)
    for one in (router, choice):
        assert routed(kernels, logits, one, {})[0].tolist() == [[3, 2, 1, 0]]


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("glm4_moe", ROUTERS["glm4_moe"]),
        ("deepseek_v3", ROUTERS["deepseek_v3"]),
        ("gpt_oss", ROUTERS["gpt_oss"]),
        ("mixtral", Router(top_k=2)),
        ("olmoe", Router(top_k=8, renormalise=False)),
    ],
)
def test_equals_transformers(kernels, rng, family, router):
    parts = parts_of(rng, router)
    logits = (rng.standard_normal((50, EXPERTS)) * 2).astype(np.float32)
    ids, weights = routed(kernels, logits, router, parts)
    want_ids, want = transformers_choice(family, router, logits, parts)
    order, want_order = np.argsort(ids, axis=1), np.argsort(want_ids, axis=1)
    assert (np.take_along_axis(ids, order, 1) == np.take_along_axis(want_ids, want_order, 1)).all()
    np.testing.assert_allclose(
        np.take_along_axis(weights, order, 1), np.take_along_axis(want, want_order, 1), rtol=1e-5
    )


def transformers_choice(family, router, logits, parts):
    """(ids, weights) of the family's router class whose projection is the identity."""
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    configuration = pytest.importorskip("transformers").AutoConfig
    names = {"gpt_oss": "num_local_experts", "mixtral": "num_local_experts", "olmoe": "num_experts"}
    changes = {
        "num_hidden_layers": 1, "hidden_size": EXPERTS, "intermediate_size": 16, "moe_intermediate_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64,
        "num_experts_per_tok": router.top_k, "norm_topk_prob": router.renormalise, "pad_token_id": None,
        "routed_scaling_factor": router.scale, "n_group": router.groups, "topk_group": router.top_groups,
        "first_k_dense_replace": 0, names.get(family, "n_routed_experts"): EXPERTS, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    model = auto.from_config(configuration.for_model(family, **changes))
    mlp = model.model.layers[0].mlp
    gate = getattr(mlp, "router", None) or mlp.gate
    with torch.no_grad():
        gate.weight.copy_(torch.eye(EXPERTS))
        if router.bias:
            gate.bias.copy_(torch.from_numpy(parts["bias"]))
        if router.correction_bias:
            gate.e_score_correction_bias.copy_(torch.from_numpy(parts["correction_bias"]))
        found = gate(torch.from_numpy(logits))
        if hasattr(mlp, "route_tokens_to_experts"):
            found = mlp.route_tokens_to_experts(found)
    ids = next(part for part in found if part.dtype == torch.int64)
    weights = next(part for part in found if part.dtype != torch.int64 and part.shape == ids.shape)
    return ids.numpy(), weights.numpy()


@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(3, 1, 1), (8, 1, 5), (64, 1, 1)])
def test_refuses(kernels, groups, top_groups, top_k):
    router = Router(top_k=top_k, groups=groups, top_groups=top_groups)
    with pytest.raises(NativeError, match="krasis_route"):
        routed(kernels, np.zeros((1, EXPERTS), np.float32), router, {})
