"""Prefill and decode through the GPU's code on the device's double, against transformers in float32.

The double runs what was submitted late and in adversarial orders and raises if something is touched too
early; each case runs under another seed and policy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.cpu.weights import ModelWeights, load_weights
from krasis.runtime.gpu import parts
from krasis.runtime.gpu.kernels import many_rows

OpenGpu = Callable[..., Any]
RelativeError = Callable[[np.ndarray, np.ndarray], float]

# Three layers: two staging buffers of a whole layer are then less than the model.
# Relative errors seen: bf16 4e-3 (its activations have 8 bits), f16 5e-4.
LIMITS = {"bf16": 1e-2, "f16": 1.5e-3}
ONE_MODEL = "7 experts, top 3, groups of 32, f16 scales"
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "6 experts": ({"num_hidden_layers": 3}, {}),
    ONE_MODEL: (
        {
            "num_hidden_layers": 3,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 1,
            "norm_topk_prob": False,
        },
        {"gpu_group": 32, "gpu_scales": "f16", "cpu_format": "int4"},
    ),
    "a scale a channel": (
        {"num_hidden_layers": 3, "num_experts": 4, "tie_word_embeddings": True, "vocab_size": 333},
        {"gpu_group": None},
    ),
}
NUM_TOKENS = 37


@pytest.fixture(scope="module", params=[*MODELS, "trained"])
def model(request: pytest.FixtureRequest, make_bundle: Callable[..., Path], make_config: Any) -> Path:
    if request.param == "trained":
        return request.getfixturevalue("trained_bundle")
    config, settings = MODELS[request.param]
    return make_bundle(make_config(**config), **settings)


@pytest.fixture(scope="module")
def weights(model: Path) -> ModelWeights:
    with Bundle.open(model) as opened:
        return load_weights(opened, "gpu")


@pytest.fixture(scope="module")
def tokens(weights: ModelWeights) -> list[int]:
    return np.random.default_rng(11).integers(0, weights.architecture.vocab_size, NUM_TOKENS).tolist()


@pytest.fixture(scope="module")
def expected(
    weights: ModelWeights, tokens: list[int], reference_logits: Callable[..., np.ndarray]
) -> np.ndarray:
    return reference_logits(weights, tokens)


@pytest.mark.parametrize(("dtype", "group_experts"), [("bf16", 1), ("bf16", 99), ("f16", 3)])
def test_streamed_logits_equal_transformers(
    model: Path,
    tokens: list[int],
    expected: np.ndarray,
    weights: ModelWeights,
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    only_path: Callable[[str], None],
    relative_error: RelativeError,
    dtype: str,
    group_experts: int,
) -> None:
    only_path("streamed")
    a = weights.architecture
    group = min(group_experts, a.num_experts)
    engine = open_gpu(
        model,
        seed=group + (dtype == "f16"),
        context=64,
        gpu_dtype=dtype,
        vram_bytes=vram_for(model, 64, group_experts=group),
    )
    found = engine.prefill(tokens, all_logits=True)
    print(f"{dtype}: {relative_error(found, expected):.2e}")
    assert relative_error(found, expected) <= LIMITS[dtype]
    last = engine._backend.last_prefill
    groups = -(-a.num_experts // group)
    record_bytes = weights.layers[0].experts.shape[1]
    assert (last.path, last.num_passes, last.num_groups) == ("streamed", 1, groups * a.num_layers)
    assert last.bytes_copied == a.num_layers * a.num_experts * record_bytes


@pytest.mark.parametrize("model", [ONE_MODEL], indirect=True)
@pytest.mark.parametrize("chunks", [(1, 36), (5, 1, 31), (16, 20, 1)])
def test_any_chunks_after_a_prefix_equal_transformers(
    model: Path,
    tokens: list[int],
    expected: np.ndarray,
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    only_path: Callable[[str], None],
    relative_error: RelativeError,
    chunks: tuple[int, ...],
) -> None:
    only_path("streamed")
    vram_bytes = vram_for(model, 64, group_experts=2)
    engine = open_gpu(
        model, policy="random", seed=sum(chunks), context=64, gpu_dtype="f16", vram_bytes=vram_bytes
    )
    found = []
    for size in chunks:
        begin = sum(len(part) for part in found)
        found.append(engine.prefill(tokens[begin : begin + size], all_logits=True))
    assert relative_error(np.concatenate(found), expected) <= LIMITS["f16"]
    # An edited last turn: what lies behind the cut is computed again, over what was there.
    engine.truncate(9)
    assert relative_error(engine.prefill(tokens[9:30]), expected[29]) <= LIMITS["f16"]


@pytest.mark.parametrize("path", ["streamed", "routed", "cpu"])
def test_every_path_gives_the_logits(
    make_bundle: Callable[..., Path],
    make_config: Callable[..., Any],
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    only_path: Callable[[str], None],
    reference_logits: Callable[..., np.ndarray],
    relative_error: RelativeError,
    random_tokens: Callable[[int, int], list[int]],
    path: str,
) -> None:
    bundle = make_bundle(make_config(num_experts=16, num_experts_per_tok=2))
    with Bundle.open(bundle) as opened:
        weights = load_weights(opened, "gpu")
    few = random_tokens(3, 300)
    only_path(path)
    vram_bytes = vram_for(bundle, 64, group_experts=2)
    engine = open_gpu(bundle, seed=5, context=64, gpu_dtype="f16", vram_bytes=vram_bytes)
    found = engine.prefill(few, all_logits=True)
    # The CPU's copy of the experts is another quantisation of the same weights.
    limit = 0.1 if path == "cpu" else LIMITS["f16"]
    assert relative_error(found, reference_logits(weights, few)) <= limit
    last = engine._backend.last_prefill
    record_bytes = weights.layers[0].experts.shape[1]
    assert last.path == path
    if path == "streamed":
        assert last.bytes_copied == 2 * 16 * record_bytes
    elif path == "routed":  # 3 tokens choose 2 to 6 experts of a layer
        assert 2 * 2 * record_bytes <= last.bytes_copied <= 2 * 6 * record_bytes
    else:
        assert last.bytes_copied == 0
    assert (
        engine.placement[0]
        == {
            "streamed": "GPU, streamed experts",
            "routed": "GPU, routed experts streamed",
            "cpu": "GPU, experts on the CPU",
        }[path]
    )


def test_decode_after_prefill_equals_transformers(
    model: Path,
    tokens: list[int],
    expected: np.ndarray,
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    relative_error: RelativeError,
) -> None:
    """Experts of decode are the CPU's, of another quantisation: the limit says how far the two are apart."""
    engine = open_gpu(model, seed=3, context=64, vram_bytes=vram_for(model, 64, group_experts=2))
    engine.prefill(tokens[:33])
    found = np.stack([engine.decode(token).copy() for token in tokens[33:]])
    assert relative_error(found, expected[33:]) <= 0.15


def test_without_cpu_experts_a_token_is_decoded_by_a_prefill(
    make_bundle: Callable[..., Path],
    make_config: Callable[..., Any],
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    reference_logits: Callable[..., np.ndarray],
    relative_error: RelativeError,
    random_tokens: Callable[[int, int], list[int]],
    only_path: Callable[[str], None],
) -> None:
    bundle = make_bundle(make_config(), tiers=("gpu",))
    with Bundle.open(bundle) as opened:
        weights = load_weights(opened, "gpu")
    tokens = random_tokens(12, 300)
    only_path("routed")
    engine = open_gpu(
        bundle, seed=2, context=16, gpu_dtype="f16", vram_bytes=vram_for(bundle, 16, group_experts=2)
    )
    engine.prefill(tokens[:9])
    found = np.stack([engine.decode(token).copy() for token in tokens[9:]])
    assert relative_error(found, reference_logits(weights, tokens)[9:]) <= LIMITS["f16"]
    assert engine._backend._parts.decoder is None
    assert engine._backend.last_prefill.path == "routed"


@pytest.mark.parametrize("model", [ONE_MODEL], indirect=True)
def test_some_experts_resident_and_none_copied_twice(
    model: Path,
    tokens: list[int],
    expected: np.ndarray,
    weights: ModelWeights,
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    only_path: Callable[[str], None],
    relative_error: RelativeError,
) -> None:
    only_path("streamed")
    a = weights.architecture
    all_experts = a.num_layers * a.num_experts
    vram_bytes = vram_for(model, 64, group_experts=a.num_experts, resident=3)
    engine = open_gpu(model, policy="random", seed=9, context=64, gpu_dtype="f16", vram_bytes=vram_bytes)
    record_bytes = weights.layers[0].experts.shape[1]
    copied = []
    for _ in range(3):  # the first pass counts, then experts move in
        engine.reset()
        found = engine.prefill(tokens, all_logits=True)
        assert relative_error(found, expected) <= LIMITS["f16"]
        copied.append(engine._backend.last_prefill.bytes_copied // record_bytes)
    assert copied[0] == all_experts
    assert copied[-1] == all_experts - 3


@pytest.mark.parametrize("model", [ONE_MODEL], indirect=True)
def test_all_experts_resident_copy_nothing(
    model: Path,
    tokens: list[int],
    expected: np.ndarray,
    open_gpu: OpenGpu,
    relative_error: RelativeError,
) -> None:
    engine = open_gpu(model, seed=1, context=64, gpu_dtype="f16")
    assert relative_error(engine.prefill(tokens, all_logits=True), expected) <= LIMITS["f16"]
    assert engine._backend.last_prefill.bytes_copied == 0
    engine.truncate(30)
    found = np.stack([engine.decode(token).copy() for token in tokens[30:]])
    assert relative_error(found, expected[30:]) <= LIMITS["f16"]  # the same experts as in prefill


def test_a_prompt_longer_than_a_batch_takes_several_passes(
    make_bundle: Callable[..., Path],
    make_config: Callable[..., Any],
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    reference_logits: Callable[..., np.ndarray],
    relative_error: RelativeError,
    random_tokens: Callable[[int, int], list[int]],
) -> None:
    bundle = make_bundle(make_config(num_hidden_layers=1, vocab_size=64))
    with Bundle.open(bundle) as opened:
        weights = load_weights(opened, "gpu")
    tokens = random_tokens(300, 64)
    # Room for a whole layer and 256 tokens: a larger batch would take the buffers' place.
    vram_bytes = vram_for(bundle, 256, group_experts=6) + 2 * 1 * 2 * 2 * 32 * (512 - 256)
    engine = open_gpu(bundle, seed=8, context=512, gpu_dtype="f16", vram_bytes=vram_bytes)
    assert 256 <= engine._backend.prefill_chunk < 300
    assert relative_error(engine.prefill(tokens), reference_logits(weights, tokens)[-1]) <= LIMITS["f16"]


@pytest.mark.parametrize("model", [ONE_MODEL], indirect=True)
def test_progress_tells_of_layers_that_are_done(
    model: Path, tokens: list[int], open_gpu: OpenGpu, vram_for: Callable[..., int]
) -> None:
    engine = open_gpu(model, seed=5, context=64, vram_bytes=vram_for(model, 64, group_experts=2))
    seen: list[int] = []
    plain = engine.prefill(tokens)
    engine.reset()
    told = engine.prefill(tokens, progress=lambda done, total: seen.append(done))
    assert seen == [
        NUM_TOKENS // 3,
        NUM_TOKENS * 2 // 3,
        NUM_TOKENS,
    ]  # three layers, all done before the logits
    np.testing.assert_array_equal(told, plain)


@pytest.mark.parametrize("model", [ONE_MODEL], indirect=True)
@pytest.mark.usefixtures("only_double")
def test_many_rows_through_a_librarys_products(
    model: Path,
    tokens: list[int],
    expected: np.ndarray,
    open_gpu: OpenGpu,
    relative_error: RelativeError,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dense weights dequantised into scratch, as a GPU does it with hundreds of tokens."""
    monkeypatch.setattr(parts, "_scratch", lambda device: device.empty((20_000,), torch.uint8))
    monkeypatch.setattr(many_rows, "least_tokens_of", lambda device: 2)
    engine = open_gpu(model, seed=4, context=64, gpu_dtype="f16")
    assert relative_error(engine.prefill(tokens, all_logits=True), expected) <= LIMITS["f16"]
    assert any(name.startswith("matmul") for name in engine._backend._device.executed_orders)
