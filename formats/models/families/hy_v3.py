"""Hunyuan 3: norms of q and k by head, sigmoid router with a correction bias, one dense layer."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    attention,
    dense_layers,
    experts,
    model,
    moe_layers,
    sigmoid_router,
)
from krasis.formats.models.spec import ModelSpec, Norm

NAME = "hy_v3"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    config.expect("mlp_bias", False)
    mixer = attention(config, qk_norm="head", rope={"theta": 11_158_840.0})
    scale = config.number("router_scaling_factor", "routed_scaling_factor", default=2.826)
    routed = experts(config, sigmoid_router(config, scale=scale), shared_field="num_shared_experts")
    norm = Norm(config.number("rms_norm_eps", default=1e-5))
    return model(config, NAME, moe_layers(config, mixer, routed, dense_layers(config, 1)), norm=norm)


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("HYV3ForCausalLM",),
    reference="HYV3ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="hy_v3",
)
