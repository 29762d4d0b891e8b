"""Qwen2-MoE: biases of q, k and v, a shared expert behind a gate, weights that are not renormalised."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    attention,
    experts,
    model,
    moe_layers,
    qwen_dense_layers,
    softmax_router,
)
from krasis.formats.models.mlps import GatedMlp
from krasis.formats.models.spec import ModelSpec

NAME = "qwen2_moe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False)
    mixer = attention(config, bias=config.flag("qkv_bias", default=True))
    shared = GatedMlp(config.size("shared_expert_intermediate_size"))
    routed = experts(config, softmax_router(config), shared=shared, shared_gate=True)
    return model(config, NAME, moe_layers(config, mixer, routed, qwen_dense_layers(config)))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Qwen2MoeForCausalLM",),
    reference="Qwen2MoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="qwen2moe",
)
