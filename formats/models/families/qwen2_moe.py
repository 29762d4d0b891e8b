"""Qwen2-MoE: biases of q, k and v, a shared expert behind a gate, weights that are not renormalised."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import gguf_attention, gguf_experts, gguf_model, refuse_gguf_features
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
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import Layer, ModelSpec

NAME = "qwen2_moe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False)
    mixer = attention(config, bias=config.flag("qkv_bias", default=True))
    shared = GatedMlp(config.size("shared_expert_intermediate_size"))
    routed = experts(config, softmax_router(config), shared=shared, shared_gate=True)
    return model(config, NAME, moe_layers(config, mixer, routed, qwen_dense_layers(config)))


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. Old files name one width: that of the shared expert, and of the experts
    that a token uses together.
    """
    refuse_gguf_features(keys, "expert_weights_scale", "leading_dense_block_count", "expert_shared_count")
    width = keys.size("feed_forward_length", default=1)
    shared = keys.size("expert_shared_feed_forward_length", default=width, least=0) or width
    routed = gguf_experts(
        keys,
        default_width=max(1, width // keys.size("expert_used_count")),
        renormalise=keys.flag("expert_weights_norm", default=False),
        shared=GatedMlp(shared),
        shared_gate=True,
    )
    mixer = gguf_attention(keys, bias=True)
    return gguf_model(keys, NAME, [Layer(mixer, routed)] * keys.size("block_count"))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Qwen2MoeForCausalLM",),
    reference="Qwen2MoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="qwen2moe",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(
        qk_norm=False, biases=True, shared="shared_expert", shared_gate="shared_expert_gate", dense=True
    ),
)
