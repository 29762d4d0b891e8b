"""A converted bundle's logits against transformers in float32 on the bundle's own dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.bundle.reader import Bundle
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.cpu.weights import ModelWeights, load_weights

RelativeError = Callable[[np.ndarray, np.ndarray], float]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
# Qwen3-30B-A3B: one layer with all its experts, a short vocabulary.
QWEN3_30B_LAYER = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 1,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40960,
    "vocab_size": 1024,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({"tie_word_embeddings": True}, {}),
    "yarn, untied, q8": (
        {"rope_scaling": YARN, "num_attention_heads": 6, "num_key_value_heads": 1, "vocab_size": 333},
        {"gpu_group": 32},
    ),
    "int4 experts, weights not normalised": (
        {
            "norm_topk_prob": False,
            "num_experts": 9,
            "num_experts_per_tok": 4,
            "hidden_size": 256,
            "head_dim": 64,
        },
        {"cpu_format": "int4"},
    ),
    "Qwen3-30B-A3B layer": (QWEN3_30B_LAYER, {}),
}


@pytest.fixture(
    scope="module",
    params=[
        "trained",
        *[pytest.param(case, marks=pytest.mark.slow) if "30B" in case else case for case in CASES],
    ],
)
def bundle(
    request: pytest.FixtureRequest, make_bundle: Callable[..., Path], make_config: Callable[..., Any]
) -> Path:
    if request.param == "trained":
        return request.getfixturevalue("trained_bundle")
    config, settings = CASES[request.param]
    return make_bundle(make_config(**config), **settings)


@pytest.fixture(scope="module")
def weights(bundle: Path) -> ModelWeights:
    with Bundle.open(bundle) as opened:
        return load_weights(opened, "cpu")


@pytest.fixture(scope="module")
def tokens(weights: ModelWeights) -> list[int]:
    vocab = weights.architecture.vocab_size
    return np.random.default_rng(11).integers(0, vocab, 16 if vocab == 1024 else 96).tolist()


@pytest.fixture(scope="module")
def expected(
    weights: ModelWeights, tokens: list[int], reference_logits: Callable[..., np.ndarray]
) -> np.ndarray:
    return reference_logits(weights, tokens)


@pytest.mark.parametrize(
    ("activations", "kv_dtype", "limit"),
    [("int8", "f16", 2e-2), ("float32", "f16", 1e-3), ("float32", "f32", 1e-4)],
)
def test_prefill_and_decode_equal_transformers(
    bundle: Path,
    tokens: list[int],
    expected: np.ndarray,
    relative_error: RelativeError,
    activations: str,
    kv_dtype: str,
    limit: float,
) -> None:
    settings = EngineSettings(
        context=128, threads=2, activations=activations, kv_dtype=kv_dtype, prefault=False
    )
    with Engine.open(bundle, settings) as engine:
        error = relative_error(engine.prefill(tokens, all_logits=True), expected)
        print(f"relative error of {bundle.parent.name}, {activations}, {kv_dtype}: {error:.2e}")
        assert error <= limit
        engine.reset()
        assert relative_error(engine.prefill(tokens), expected[-1]) <= limit
        engine.reset()
        one_by_one = np.stack([engine.decode(token).copy() for token in tokens])
        assert relative_error(one_by_one, expected) <= limit


def test_any_prefill_chunk_gives_the_same_bits(bundle: Path, tokens: list[int]) -> None:
    found = []
    for chunk in (512, 32, 7, 1):
        with Engine.open(bundle, EngineSettings(context=128, threads=2, prefill_chunk=chunk)) as engine:
            found.append(engine.prefill(tokens, all_logits=True))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_gpu_experts_run_in_float(
    make_bundle: Callable[..., Path],
    make_config: Callable[..., Any],
    random_tokens: Callable[[int, int], list[int]],
    reference_logits: Callable[..., np.ndarray],
    relative_error: RelativeError,
) -> None:
    bundle = make_bundle(make_config())
    with Bundle.open(bundle) as opened:
        weights = load_weights(opened, "gpu")
    tokens = random_tokens(50, 300)
    with Engine.open(bundle, EngineSettings(activations="float32", experts="gpu", kv_dtype="f32")) as engine:
        assert (
            relative_error(engine.prefill(tokens, all_logits=True), reference_logits(weights, tokens)) <= 1e-4
        )
