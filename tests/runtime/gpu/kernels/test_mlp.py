"""Wrappers of activations, additions to the residual and scored routing, against float64."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch.nn.functional import gelu, silu

from krasis.formats.errors import NativeError
from krasis.formats.models.mlps import Activation, ActivationKind, Router
from krasis.runtime.gpu.kernels.mlp import ACTIVATION_CODES
from krasis.runtime.gpu.kernels.router_arguments import RouterVectors


def activated(a: Activation, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    low, cut = g.clamp(max=a.limit), u.clamp(-a.limit, a.limit)
    return {
        "silu": silu(g) * u,
        "gelu_tanh": gelu(g, approximate="tanh") * u,
        "swiglu_offset": low * torch.sigmoid(a.alpha * low) * (cut + 1),
        "silu_clamped_before": silu(low) * cut,
        "silu_clamped_after": silu(g).clamp(max=a.limit) * cut,
        "relu_squared": u.relu().square(),
    }[a.kind]


@pytest.mark.parametrize("kind", ACTIVATION_CODES)
def test_gated_activation(bench: Any, kind: ActivationKind) -> None:
    activation = Activation(kind, limit=1.5, alpha=1.702)
    width = 64 if activation.gated else 32
    x, bias = 2 * bench.random(5, width), bench.random(width, seed=2)
    out = bench.empty(5, 32)
    bench.kernels.gated_activation(bench.stream, bench.put(x), activation, out, bench.put(bias))
    biased = (x + bias).double()
    expected = activated(activation, biased[:, :32], biased[:, -32:])
    torch.testing.assert_close(bench.get(out).double(), expected, rtol=1e-5, atol=1e-5)


def test_an_activation_without_a_kernel_is_refused(bench: Any) -> None:
    missing = set(get_args(ActivationKind)) - set(ACTIVATION_CODES)
    assert missing == {"situ"}
    with pytest.raises(NativeError, match="no such activation"):
        bench.kernels.gated_activation(
            bench.stream, bench.empty(5, 64), Activation("situ"), bench.empty(5, 32)
        )


def test_add_rows(bench: Any) -> None:
    hidden, x = bench.random(3, 64), bench.random(3, 64, dtype=torch.bfloat16, seed=2)
    gates, bias = bench.random(3, 1, seed=3), bench.random(64, seed=4)
    placed = bench.put(hidden)
    bench.kernels.add_rows(bench.stream, placed, bench.put(x), bench.put(gates), bench.put(bias))
    expected = hidden.double() + torch.sigmoid(gates.double()) * (x.double() + bias.double())
    torch.testing.assert_close(bench.get(placed).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_sigmoid_router_with_groups(bench: Any) -> None:
    router = Router(4, "sigmoid", scale=2.5, correction_bias=True, groups=4, top_groups=2, sum_epsilon=1e-20)
    logits, correction = 2 * bench.random(9, 32), bench.random(32, seed=2)
    ids, weights = bench.empty(9, 4, dtype=torch.int32), bench.empty(9, 4)
    vectors = RouterVectors(correction=bench.put(correction))
    bench.kernels.route(bench.stream, bench.put(logits), router, ids, weights, vectors)
    scores = torch.sigmoid(logits.double())
    keys = (scores + correction.double()).view(9, 4, 8)
    kept = keys.topk(2).values.sum(2).topk(2).indices
    mask = torch.zeros(9, 4, dtype=torch.bool).scatter_(1, kept, True)
    keys = keys.masked_fill(~mask[:, :, None], -torch.inf).flatten(1)
    expected = keys.topk(4).indices
    shares = scores.gather(1, expected)
    assert torch.equal(bench.get(ids).long(), expected)
    wanted = 2.5 * shares / shares.sum(1, keepdim=True)
    torch.testing.assert_close(bench.get(weights).double(), wanted, rtol=1e-5, atol=1e-7)


def test_vectors_that_the_router_does_not_ask_for_are_refused(bench: Any) -> None:
    ids, weights = bench.empty(2, 4, dtype=torch.int32), bench.empty(2, 4)
    logits, vector = bench.empty(2, 16), bench.empty(16)
    with pytest.raises(NativeError, match=r"route\.correction"):
        bench.kernels.route(bench.stream, logits, Router(4), ids, weights, RouterVectors(correction=vector))
    with pytest.raises(NativeError, match=r"route\.logit_bias"):
        bench.kernels.route(bench.stream, logits, Router(4, bias=True), ids, weights)
