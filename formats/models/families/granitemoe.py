"""Granite-MoE: softmax over the chosen experts, factors on embedding, residual, attention and logits."""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.family import Family, Source
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import gguf_attention, gguf_experts, gguf_model, refuse_gguf_features
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, moe_layers, softmax_router
from krasis.formats.models.mlps import Router
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import Layer, ModelSpec

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


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    refuse_gguf_features(keys, "expert_weights_scale", "leading_dense_block_count", "expert_shared_count")
    keys.expect("expert_shared_feed_forward_length", 0)
    width = "expert_feed_forward_length" if keys.has("expert_feed_forward_length") else "feed_forward_length"
    router = Router(keys.size("expert_used_count"), "softmax_of_top", renormalise=False)
    mixer = gguf_attention(keys)
    # A scale of 0 is none in GGUFs.
    mixer = replace(mixer, scale=keys.number("attention.scale", default=0.0) or mixer.scale)
    layers = [Layer(mixer, gguf_experts(keys, width=width, router=router))] * keys.size("block_count")
    return replace(
        gguf_model(keys, NAME, layers),
        embedding_scale=keys.number("embedding_scale", default=1.0) or 1.0,
        residual_scale=keys.number("residual_scale", default=1.0) or 1.0,
        logits_scale=1.0 / (keys.number("logit_scale", default=1.0) or 1.0),
    )


def _names() -> dict[str, Source]:
    """Gate and up of all experts are one tensor, gate first; a GGUF has them apart."""
    names = decoder_names(mlp="block_sparse_moe", router="router.layer", qk_norm=False, permuted=True)
    for name, theirs in (("experts.gate_up", "input_linear"), ("experts.down", "output_linear")):
        hub = f"model.layers.{{i}}.block_sparse_moe.{theirs}.weight"
        names[name] = replace(names[name], hf=(hub, *names[name].hf))
    return names


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("GraniteMoeForCausalLM",),
    reference="GraniteMoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="granitemoe",
    spec_from_gguf=spec_from_gguf,
    names=_names(),
)
