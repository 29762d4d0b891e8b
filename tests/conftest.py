"""Shared by all tests: transformers' own model on the weights of a bundle."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))


def rope_parameters(architecture: Any) -> dict[str, Any]:
    """Our record in transformers' words."""
    scaling = architecture.rope_scaling
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    if scaling.kind != "none":
        parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        parameters |= {
            "original_max_position_embeddings": scaling.original_max_positions,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        if scaling.attention_factor is not None:
            parameters["attention_factor"] = scaling.attention_factor
    return parameters


def state_of_layer(weights: Any, index: int) -> dict[str, np.ndarray]:
    """transformers' names of one layer's dequantised weights."""
    from krasis.formats.layouts import Int8RowsLayout
    from krasis.runtime.cpu.weights import to_float32

    a, layer = weights.architecture, weights.layers[index]

    def unpacked(name: str) -> np.ndarray:
        weight = layer.int8(name)
        return Int8RowsLayout().unpack(weight.codes, weight.scales)

    qkv, router = unpacked("attention.qkv"), layer.matrix("experts.router")
    rows = np.cumsum([a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim])
    q, k, v = np.split(qkv, rows)
    sizes = (a.hidden_size, a.expert_intermediate_size)
    experts = [weights.expert_layout.unpack_expert(record, *sizes) for record in layer.records()]
    state = {
        "input_layernorm.weight": layer.vector("attention.norm"),
        "self_attn.q_proj.weight": q,
        "self_attn.k_proj.weight": k,
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": unpacked("attention.output"),
        "self_attn.q_norm.weight": layer.vector("attention.q_norm"),
        "self_attn.k_norm.weight": layer.vector("attention.k_norm"),
        "post_attention_layernorm.weight": layer.vector("experts.norm"),
        "mlp.gate.weight": to_float32(router.data, router.dtype),
        "mlp.experts.gate_up_proj": np.stack([np.concatenate([gate, up]) for gate, up, _ in experts]),
        "mlp.experts.down_proj": np.stack([down for _, _, down in experts]),
    }
    return {f"model.layers.{index}.{name}": array for name, array in state.items()}


def transformers_model(weights: Any) -> Any:
    """Qwen3MoeForCausalLM in float32 whose every weight is a dequantised one of ours (a ``ModelWeights``)."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from krasis.formats.layouts import Int8RowsLayout
    from krasis.runtime.cpu.weights import to_float32

    a = weights.architecture
    config = Qwen3MoeConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        max_position_embeddings=a.max_positions,
        rms_norm_eps=a.rms_norm_eps,
        moe_intermediate_size=a.expert_intermediate_size,
        num_experts_per_tok=a.num_experts_per_token,
        num_local_experts=a.num_experts,
        norm_topk_prob=a.norm_topk_prob,
        rope_parameters=rope_parameters(a),
        # The bundle's output head is quantised, its embedding is not: they are two weights even when tied.
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    head = Int8RowsLayout().unpack(weights.lm_head.codes, weights.lm_head.scales)
    state = {
        "model.embed_tokens.weight": to_float32(weights.embedding.data, weights.embedding.dtype),
        "model.norm.weight": weights.final_norm,
        "lm_head.weight": head[: a.vocab_size],
    }
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for index in range(a.num_layers):
        state |= state_of_layer(weights, index)
    missing = model.load_state_dict(
        {name: torch.from_numpy(array) for name, array in state.items()}, strict=True
    )
    if missing.missing_keys or missing.unexpected_keys:
        raise ValueError(f"names differ: {missing}")
    return model.eval()


@pytest.fixture(scope="session")
def reference_logits() -> Callable[[Any, list[int]], np.ndarray]:
    """(ModelWeights, tokens) -> float32 logits [tokens, vocab] of transformers' model."""

    def logits(weights: Any, tokens: list[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            return transformers_model(weights)(torch.tensor([tokens])).logits[0].numpy()

    return logits


@pytest.fixture(scope="session")
def reference_model() -> Callable[[Any], Any]:
    """ModelWeights -> transformers' model on them, for what ``reference_logits`` cannot ask."""
    return transformers_model


@pytest.fixture(scope="session")
def relative_error() -> Callable[[np.ndarray, np.ndarray], float]:
    """The norm of the difference over the norm of what is expected."""

    def error(found: np.ndarray, expected: np.ndarray) -> float:
        if found.shape != expected.shape:
            raise ValueError(f"shapes differ: {found.shape}, {expected.shape}")
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    return error


# A job started in the background ignores SIGINT, and its children would inherit that: the tests that press
# Ctrl-C need what a terminal gives.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def handlers_of_signals_stay() -> Iterator[None]:
    """A handler that a test leaves behind changes what later tests of the process see."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before
