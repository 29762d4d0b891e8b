"""Granite-MoE: softmax over the chosen experts, factors on embedding, residual, attention and logits."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, moe_layers, softmax_router
from krasis.formats.models.spec import ModelSpec

NAME = "granitemoe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    mixer = attention(config, scale=config.number("attention_multiplier", default=1.0))
    router = softmax_router(config, score="softmax_of_top", renormalise=False)
    routed = experts(config, router, width="intermediate_size", shared_field=None)
    divisor = config.number("logits_scaling", default=1.0)
    if divisor <= 0:
        raise config.unsupported("logits_scaling", divisor, "above 0")
    return model(
        config,
        NAME,
        moe_layers(config, mixer, routed),
        embedding_scale=config.number("embedding_multiplier", default=1.0),
        residual_scale=config.number("residual_multiplier", default=1.0),
        logits_scale=1.0 / divisor,
    )


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("GraniteMoeForCausalLM",),
    reference="GraniteMoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="granitemoe",
)
