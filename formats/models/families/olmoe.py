"""OLMoE: norms of q and k over the whole projection, weights that are not renormalised."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import gguf_attention, gguf_experts, gguf_model, refuse_gguf_features
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, moe_layers, softmax_router
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import Layer, ModelSpec, Norm

NAME = "olmoe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    clip = config.number("clip_qkv") if config.has("clip_qkv") else None
    mixer = attention(config, qk_norm="flat", clip=clip)
    routed = experts(config, softmax_router(config), width="intermediate_size")
    norm = Norm(config.number("rms_norm_eps", default=1e-5))
    return model(config, NAME, moe_layers(config, mixer, routed), norm=norm)


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    refuse_gguf_features(keys, "expert_weights_scale", "leading_dense_block_count", "expert_shared_count")
    clip = keys.number("attention.clamp_kqv") if keys.has("attention.clamp_kqv") else None
    width = "expert_feed_forward_length" if keys.has("expert_feed_forward_length") else "feed_forward_length"
    routed = gguf_experts(keys, width=width, renormalise=keys.flag("expert_weights_norm", default=False))
    mixer = gguf_attention(keys, qk_norm="flat", clip=clip)
    return gguf_model(keys, NAME, [Layer(mixer, routed)] * keys.size("block_count"))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("OlmoeForCausalLM",),
    reference="OlmoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="olmoe",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(),
)
