"""krasis_gated_activation, krasis_add_rows, and krasis_moe with every activation, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from krasis.formats.layouts import CpuTileLayout
from krasis.formats.layouts.matrix import MatrixView
from krasis.formats.models.mlps import Activation
from krasis.runtime.cpu.kernels import Acts, moe_workspace_bytes, workspace

ACTIVATIONS = {
    "silu": Activation(),
    "gelu_tanh": Activation("gelu_tanh"),
    "gpt_oss": Activation("swiglu_offset", limit=7.0, alpha=1.702),
    "clamped before": Activation("silu_clamped_before", limit=2.0),
    "clamped after": Activation("silu_clamped_after", limit=1.0),
    "relu_squared": Activation("relu_squared"),
}
GATED = [name for name, activation in ACTIVATIONS.items() if activation.gated]


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def expected(activation, gate, up):
    """The formulas of formats.models.mlps.Activation in float64."""
    g, u, limit = gate.astype(np.float64), up.astype(np.float64), activation.limit
    cut = np.clip(u, -limit, limit)
    if activation.kind == "silu":
        return g * sigmoid(g) * u
    if activation.kind == "gelu_tanh":
        return 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    if activation.kind == "swiglu_offset":
        h = np.minimum(g, limit)
        return h * sigmoid(activation.alpha * h) * (cut + 1)
    if activation.kind == "silu_clamped_before":
        h = np.minimum(g, limit)
        return h * sigmoid(h) * cut
    if activation.kind == "silu_clamped_after":
        return np.minimum(g * sigmoid(g), limit) * cut
    return np.maximum(u, 0) ** 2


def inputs(rng, activation, tokens, size, spread=4.0):
    width = 2 * size if activation.gated else size
    return (rng.standard_normal((tokens, width)) * spread).astype(np.float32)


def halves(x, activation):
    return (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]) if activation.gated else (x, x)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "size"), [(0, 32), (1, 16), (1, 1408), (7, 96), (70, 704)])
def test_floats_equal_float64(kernels, rng, name, tokens, size):
    activation = ACTIVATIONS[name]
    x = inputs(rng, activation, tokens, size)
    out = np.full((tokens, size), np.nan, np.float32)
    kernels.gated_activation(x, activation, out)
    np.testing.assert_allclose(out, expected(activation, *halves(x, activation)), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_acts_are_the_floats_quantised(kernels, rng, name):
    activation = ACTIVATIONS[name]
    x = inputs(rng, activation, 5, 128)
    out, acts, again = np.empty((5, 128), np.float32), Acts.allocate(5, 128), Acts.allocate(5, 128)
    kernels.gated_activation(x, activation, out, acts)
    kernels.quantize(out, again)
    for one, other in ((acts.q, again.q), (acts.scale, again.scale), (acts.sum, again.sum)):
        assert one.tobytes() == other.tobytes()
    kernels.gated_activation(x, activation, acts=again)
    assert acts.q.tobytes() == again.q.tobytes()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("threads", [1, 4])
def test_same_bits_for_any_threads_batch_and_isa(make_kernels, isa, rng, name, threads):
    activation = ACTIVATIONS[name]
    x = inputs(rng, activation, 90, 480)
    out, one = np.empty((90, 480), np.float32), np.empty((1, 480), np.float32)
    make_kernels(isa, threads).gated_activation(x, activation, out)
    for row in (0, 44, 89):
        make_kernels("avx2", 1).gated_activation(x[row : row + 1], activation, one)
        assert one.tobytes() == out[row].tobytes()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extremes(kernels, name):
    """Large numbers neither overflow early nor become NaN; a NaN shows."""
    activation = ACTIVATIONS[name]
    ends = np.array([-1e10, -100, -1e-30, 0, 1e-30, 100, 1e10, np.nan], np.float32)
    gate, up = np.repeat(ends, 8)[None], np.tile(ends, 8)[None]
    x = np.concatenate([gate, up], axis=1) if activation.gated else up
    out = np.empty((1, 64), np.float32)
    kernels.gated_activation(x, activation, out)
    with np.errstate(invalid="ignore", over="ignore"):
        want = expected(activation, *halves(x, activation))
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want))
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "parts", [("x",), ("bias",), ("x", "bias"), ("x", "logits"), ("x", "bias", "logits")]
)
@pytest.mark.parametrize(("tokens", "k"), [(0, 8), (1, 2880), (7, 33), (90, 512)])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_add_rows(make_kernels, isa, rng, parts, tokens, k, scale):
    shapes = {"x": (tokens, k), "bias": (k,), "logits": (tokens, 1)}
    arrays = {name: rng.standard_normal(shapes[name]).astype(np.float32) * 3 for name in parts}
    before = rng.standard_normal((tokens, k)).astype(np.float32)
    out = before.copy()
    make_kernels(isa, 3).add_rows(out, **arrays, scale=scale)
    want = before.astype(np.float64)
    if "bias" in arrays:
        want += arrays["bias"]
    if "x" in arrays:
        want += arrays["x"] * (sigmoid(arrays["logits"].astype(np.float64)) if "logits" in arrays else 1.0)
    np.testing.assert_allclose(out, want * np.float32(scale), rtol=1e-6, atol=1e-6)
    for row in range(0, tokens, 40):
        own = before[row : row + 1].copy()
        rows = {name: part if name == "bias" else part[row : row + 1] for name, part in arrays.items()}
        make_kernels("avx2", 1).add_rows(own, **rows, scale=scale)
        assert own.tobytes() == out[row].tobytes()


HIDDEN, SIZE, EXPERTS, TOP_K, TOKENS = 64, 128, 5, 2, 11


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("tiles", ["q8", "i4"])
def test_experts_equal_float64(make_kernels, isa, rng, name, tiles):
    """The dequantised weights and inputs in float64; the intermediate is quantised to int8 within."""
    activation, layout = ACTIVATIONS[name], CpuTileLayout(tiles)
    kernels = make_kernels(isa, 2)
    gated = activation.gated
    record_bytes = layout.expert_record(HIDDEN, SIZE, gated).record_bytes
    blob = np.zeros((EXPERTS, record_bytes), np.uint8)
    for record in blob:
        shapes = ((SIZE, HIDDEN), (SIZE, HIDDEN), (HIDDEN, SIZE))
        parts = [rng.standard_normal(shape).astype(np.float32) / 3 for shape in shapes]
        gate, up, down = (MatrixView(part, "F32") for part in parts)
        layout.pack_expert(kernels.pool, gate if gated else None, up, down, record)
    x = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    acts = Acts.allocate(TOKENS, HIDDEN)
    kernels.quantize(x, acts)
    ids = rng.integers(0, EXPERTS, (TOKENS, TOP_K)).astype(np.int32)
    weights = rng.uniform(0.2, 1, (TOKENS, TOP_K)).astype(np.float32)
    out = np.zeros((TOKENS, HIDDEN), np.float32)
    scratch = workspace(moe_workspace_bytes(TOKENS, HIDDEN, SIZE, EXPERTS, TOP_K))
    ran = kernels.moe(blob, record_bytes, tiles, acts, ids, weights, out, SIZE, EXPERTS, scratch, activation)
    assert ran == ids.size
    want = np.zeros((TOKENS, HIDDEN))
    read = (acts.q.reshape(TOKENS, -1, 32) * acts.scale[..., None].astype(np.float64)).reshape(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            gate, up, down = layout.unpack_expert(blob[expert], HIDDEN, SIZE, gated)
            middle = expected(activation, gate @ read[token], up @ read[token])
            want[token] += weight * (down @ middle)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    assert error < 0.01, error
    other = np.zeros_like(out)
    make_kernels("avx2", 1).moe(
        blob, record_bytes, tiles, acts, ids, weights, other, SIZE, EXPERTS, scratch, activation
    )
    assert other.tobytes() == out.tobytes()
