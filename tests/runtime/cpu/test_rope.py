"""Rotary tables equal transformers' for every kind of scaling."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.rope import Rope, RopeScaling
from krasis.runtime.cpu.rope import ROWS_AT_ONCE, RopeTables, inverse_frequencies, rope_tables

ROPE = Rope(128, 1_000_000.0)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES: dict[str, tuple[dict[str, Any], RopeScaling]] = {
    "plain": ({"rope_type": "default"}, RopeScaling()),
    "linear": ({"rope_type": "linear", "factor": 3.0}, RopeScaling("linear", 3.0)),
    "yarn": (YARN, RopeScaling("yarn", 4.0, 32768)),
    "yarn given factor": ({**YARN, "attention_factor": 0.8}, RopeScaling("yarn", 4.0, 32768, 0.8)),
    "yarn betas": (
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        RopeScaling("yarn", 4.0, 32768, None, 16.0, 2.0),
    ),
    "yarn no truncation": ({**YARN, "truncate": False}, RopeScaling("yarn", 4.0, 32768, truncate=False)),
    "yarn tiny factor": ({**YARN, "factor": 1.0}, RopeScaling("yarn", 1.0, 32768)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "yarn short original": (
        {**YARN, "original_max_position_embeddings": 64},
        RopeScaling("yarn", 4.0, 64),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1_000_000.0), (64, 10_000.0)])
def test_tables_equal_transformers(case: str, head_dim: int, theta: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    parameters, scaling = CASES[case]
    config = Qwen3MoeConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=40960,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    embedding = Qwen3MoeRotaryEmbedding(config)
    # One step of float32 apart where the two libraries' power functions round differently.
    frequencies, factor = inverse_frequencies(head_dim, theta, scaling)
    np.testing.assert_allclose(frequencies, embedding.inv_freq.numpy(), rtol=3e-7)
    assert factor == pytest.approx(embedding.attention_scaling, rel=1e-12)
    num_positions = 512
    positions = torch.arange(num_positions)[None]
    cos, sin = embedding(torch.zeros(1, 1, dtype=torch.float32), positions)
    our_cos, our_sin = rope_tables(Rope(head_dim, theta, scaling=scaling), num_positions)
    # An angle of 512 moves by 1.5e-4 with its frequency's last bit.
    np.testing.assert_allclose(our_cos, cos[0, :, : head_dim // 2].numpy(), atol=2e-4)
    np.testing.assert_allclose(our_sin, sin[0, :, : head_dim // 2].numpy(), atol=2e-4)
    assert our_cos.dtype == our_sin.dtype == np.float32


def test_far_positions_stay_exact() -> None:
    cos, sin = rope_tables(replace(ROPE, theta=10_000.0), 40960)
    angle = np.float64(np.float32(40959) * np.float32(1.0))
    assert cos[40959, 0] == np.float32(np.cos(angle))
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, atol=1e-6)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="proportional"):
        inverse_frequencies(64, 10_000.0, RopeScaling("proportional", 2.0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "wanted",
    [
        [1],
        [1, 2, 3],
        [ROWS_AT_ONCE, ROWS_AT_ONCE + 1],
        [ROWS_AT_ONCE + 1, 7, 9000],
        [9000, 1, 9000],
        [3, 5000, 4096, 8193],
    ],
    ids=str,
)
def test_rows_are_the_same_in_whatever_order_they_are_needed(case: str, wanted: list[int]) -> None:
    rope = replace(ROPE, scaling=CASES[case][1])
    tables, whole = RopeTables(rope, 9000), rope_tables(rope, 9000)
    before = (tables.cos, tables.sin)
    for count in wanted:
        tables.ensure(count)
        for found, expected in zip((tables.cos, tables.sin), whole, strict=True):
            np.testing.assert_array_equal(found[:count], expected[:count])
    assert before[0] is tables.cos
    assert before[1] is tables.sin


def test_rows_that_are_not_needed_are_not_computed() -> None:
    tables = RopeTables(ROPE, 3 * ROWS_AT_ONCE)
    tables.ensure(10)
    assert not tables.cos[ROWS_AT_ONCE:].any()
    tables.ensure(3 * ROWS_AT_ONCE)
    assert tables.cos[-1].any()
    assert RopeTables(ROPE, 1).cos.tolist() == [[1.0] * (ROPE.dims // 2)]


@pytest.mark.parametrize("case", ["plain", "yarn"])
def test_long_tables_are_their_pieces(case: str) -> None:
    """They are computed by several threads."""
    rope = replace(ROPE, scaling=CASES[case][1])
    first, end = 1234, 1234 + 5 * ROWS_AT_ONCE + 7
    long = rope_tables(rope, end, first)
    for begin in range(first, end, 3000):
        last = min(end, begin + 3000)
        for found, expected in zip(long, rope_tables(rope, last, begin), strict=True):
            np.testing.assert_array_equal(found[begin - first : last - first], expected)


def test_proportional_tables_equal_transformers() -> None:
    """Gemma 4's: every pair of a head has a place, those beyond a quarter stand still."""
    transformers = pytest.importorskip("transformers")
    import torch
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    config = transformers.Gemma4TextConfig(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=64,
        global_head_dim=128,
        attention_k_eq_v=True,
    )
    embedding = Gemma4TextRotaryEmbedding(config)
    positions = torch.arange(500)[None]
    cos, sin = (table[0].numpy() for table in embedding(torch.zeros(1), positions, "full_attention"))
    rope = Rope(32, 1e6, scaling=RopeScaling("proportional", 1.0))
    tables = RopeTables(rope, 500, 128)
    tables.ensure(500)
    np.testing.assert_allclose(tables.cos, cos[:, :64], atol=5e-5)
    np.testing.assert_allclose(tables.sin, sin[:, :64], atol=5e-5)
    assert not tables.sin[:, 16:].any()


@pytest.mark.parametrize("theta", [1e4, 1.5e5, 1e6, 8e6])
@pytest.mark.parametrize("dims", [64, 128, 256])
def test_periods_are_rounded_once_on_every_machine(theta: float, dims: int) -> None:
    """Of exponents in float32, as transformers forms them; float32 powers of some libraries are a bit off."""
    found, _ = inverse_frequencies(dims, theta, RopeScaling())
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    exact = [Decimal(theta) ** Decimal(float(exponent)) for exponent in exponents]
    np.testing.assert_array_equal(
        found, np.float32(1.0) / np.array([float(one) for one in exact], np.float32)
    )
