"""The NumPy twins against transformers' Qwen3-MoE block and against the kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krasis.formats.models.mlps import Router
from krasis.runtime import reference
from krasis.runtime.cpu.kernels import Acts, moe_workspace_bytes, workspace

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 96, 64, 6, 3


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def experts(rng):
    """gate, up [E, I, H] and down [E, H, I]."""
    wide = (NUM_EXPERTS, INTERMEDIATE, HIDDEN)
    return (
        normal(rng, *wide) / 10,
        normal(rng, *wide) / 10,
        normal(rng, NUM_EXPERTS, HIDDEN, INTERMEDIATE) / 10,
    )


def test_moe_equals_transformers(rng, experts):
    configuration = pytest.importorskip("transformers.models.qwen3_moe.configuration_qwen3_moe")
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = configuration.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        hidden_act="silu",
    )
    gate, up, down = experts
    router = normal(rng, NUM_EXPERTS, HIDDEN)
    block = modeling.Qwen3MoeSparseMoeBlock(config)
    state = {
        "gate.weight": torch.from_numpy(router),
        "experts.gate_up_proj": torch.from_numpy(np.concatenate([gate, up], axis=1)),
        "experts.down_proj": torch.from_numpy(down),
    }
    block.load_state_dict(state)
    x = normal(rng, 11, HIDDEN)
    with torch.no_grad():
        want = block(torch.from_numpy(x)[None])[0].numpy()
    ids, weights = reference.route(reference.gemm(x, router), Router(TOP_K))
    out = reference.moe(x, ids, weights, lambda e: (gate[e], up[e], down[e]))
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


def test_moe_skips_missing_experts(rng, experts):
    gate, up, down = experts
    x = normal(rng, 2, HIDDEN)
    ids = np.array([[1, -1], [-1, -1]], np.int32)
    out = reference.moe(x, ids, np.ones((2, 2), np.float32), lambda e: (gate[e], up[e], down[e]))
    assert out[0].any()
    assert not out[1].any()


def test_attention_equals_torch(rng):
    q, k, v = normal(rng, 130, 4, 32), normal(rng, 2, 200, 32), normal(rng, 2, 200, 32)
    out = reference.attention(q, k, v, start=9, scale=32**-0.5)
    wide = (torch.from_numpy(x[:, :139].repeat(2, axis=0)) for x in (k, v))
    mask = torch.arange(139)[None, :] <= torch.arange(9, 139)[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(
        torch.from_numpy(q).transpose(0, 1), *wide, attn_mask=mask
    )
    np.testing.assert_allclose(out, want.transpose(0, 1).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_twins_equal_the_kernels(kernels, rng, tokens):
    x, weight = normal(rng, tokens, 96), normal(rng, 96)
    acts, out = Acts.allocate(tokens, 96), np.empty_like(x)
    kernels.rms_norm(x, weight, 1e-6, out, acts)
    np.testing.assert_allclose(reference.rms_norm(x, weight, 1e-6), out, rtol=1e-5, atol=1e-6)
    twin = reference.quantize(out)
    np.testing.assert_array_equal(twin.q, acts.q)
    np.testing.assert_array_equal(twin.scale, acts.scale)
    np.testing.assert_array_equal(twin.sum, acts.sum)
    np.testing.assert_array_equal(
        twin.dequantized().reshape(tokens, 96), acts.q * np.repeat(acts.scale, 32, axis=1)
    )


def test_silu_has_no_overflow():
    with np.errstate(over="raise", invalid="raise"):
        out = reference.silu(np.array([-1e4, -1.0, 0.0, 1.0, 1e4], np.float32))
    np.testing.assert_allclose(out, [0, -0.26894143, 0, 0.7310586, 1e4], rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_gemm_int8_rows(kernels, rng, tokens):
    n, k = 64, 96
    rows = rng.integers(-127, 128, (n, k)).astype(np.int8)
    packed = np.ascontiguousarray(rows.reshape(n // 32, 32, k // 4, 4).transpose(0, 2, 1, 3))
    scales, acts = rng.random(n).astype(np.float32), Acts.allocate(tokens, k)
    kernels.quantize(normal(rng, tokens, k), acts)
    x = (acts.q * np.repeat(acts.scale, 32, axis=1)).astype(np.float64)
    want = x @ (rows * scales[:, None].astype(np.float64)).T
    out = np.full((tokens, n), np.nan, np.float32)
    kernels.gemm_int8_rows(acts, packed, scales, out)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-4)
    kernels.gemm_int8_rows(acts, packed, scales, out, accumulate=True)
    np.testing.assert_allclose(out, 2 * want, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_gemm_float(kernels, rng, dtype):
    x, weight = normal(rng, 9, 96), normal(rng, 40, 96)
    if dtype == "BF16":
        stored = (weight.view(np.uint32) >> 16).astype(np.uint16)
        weight = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = weight.astype(np.float16 if dtype == "F16" else np.float32)
        weight = stored.astype(np.float32)
    out = np.full((9, 40), np.nan, np.float32)
    kernels.gemm_float(x, stored, out)
    np.testing.assert_allclose(out, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-4, atol=1e-5)


def q8_tiles(rows):
    """Packs [n, k] floats into cpu-q8-r32-b32 tiles; returns the bytes and the dequantised weight."""
    n, k = rows.shape
    blocks = rows.reshape(n // 32, 32, k // 32, 32).transpose(0, 2, 1, 3)  # [strip, block, row, 32]
    scale = (np.abs(blocks).max(axis=3) / 127).astype(np.float16)
    q = np.rint(blocks / scale[..., None].astype(np.float32)).clip(-127, 127).astype(np.int8)
    codes = q.reshape(n // 32, k // 32, 32, 8, 4).transpose(0, 1, 3, 2, 4).reshape(n // 32, k // 32, 1024)
    scales = np.ascontiguousarray(scale).view(np.uint8).reshape(n // 32, k // 32, 64)
    tiles = np.concatenate([codes.view(np.uint8), scales], axis=2)
    wide = q * scale[..., None].astype(np.float32)
    return tiles.ravel(), wide.transpose(0, 2, 1, 3).reshape(n, k)


@pytest.mark.parametrize("tokens", [1, 4, 33])
def test_moe_of_the_wrapper_equals_its_twin(kernels, rng, experts, tokens):
    hidden = 64
    records, dequantised = [], []
    for gate, up, down in zip(*experts, strict=True):
        halves = np.stack(
            [gate[:, :hidden].reshape(-1, 16, hidden), up[:, :hidden].reshape(-1, 16, hidden)], axis=1
        )
        w13, fused = q8_tiles(np.ascontiguousarray(halves.reshape(2 * INTERMEDIATE, hidden)))
        w2, wide_down = q8_tiles(np.ascontiguousarray(down[:hidden]))
        fused = fused.reshape(-1, 2, 16, hidden)
        dequantised.append((fused[:, 0].reshape(-1, hidden), fused[:, 1].reshape(-1, hidden), wide_down))
        records.append(np.concatenate([w13, w2, np.zeros(-len(w13) - len(w2) & 4095, np.uint8)]))
    blob = np.stack(records)
    ids = np.argsort(rng.random((tokens, NUM_EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    ids[0, 1] = -1
    weights, acts = rng.random((tokens, TOP_K)).astype(np.float32), Acts.allocate(tokens, hidden)
    kernels.quantize(normal(rng, tokens, hidden), acts)
    out = np.ones((tokens, hidden), np.float32)
    scratch = workspace(moe_workspace_bytes(tokens, hidden, INTERMEDIATE, NUM_EXPERTS, TOP_K))
    executed = kernels.moe(
        blob, blob.shape[1], "q8", acts, ids, weights, out, INTERMEDIATE, NUM_EXPERTS, scratch
    )
    x = (acts.q * np.repeat(acts.scale, 32, axis=1)).astype(np.float64)
    want = np.ones((tokens, hidden))
    for token, slot in np.argwhere(ids >= 0):
        gate, up, down = dequantised[ids[token, slot]]
        inner = (reference.silu(x[token] @ gate.T) * (x[token] @ up.T)).astype(np.float32)
        want[token] += weights[token, slot] * (reference.quantize(inner[None]).dequantized()[0] @ down.T)
    assert executed == tokens * TOP_K - 1
    size = np.linalg.norm(want - 1)
    assert np.linalg.norm(out - want) <= 1e-3 * size  # a rounding of the intermediate may fall the other way
    twin = 1 + reference.moe(x, ids, weights, dequantised.__getitem__)
    assert np.linalg.norm(out - twin) <= 2e-2 * size
