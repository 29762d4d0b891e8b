"""MiniMax-M2: norms over the whole q and k, sigmoid router, half of each head rotated."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    gguf_attention,
    gguf_experts,
    gguf_layers,
    gguf_model,
    gguf_sigmoid_router,
    refuse_gguf_features,
)
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, moe_layers, num_layers, sigmoid_router
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import ModelSpec

NAME = "minimax_m2"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("use_qk_norm", True)
    config.expect("qk_norm_type", "per_layer")
    config.expect("use_routing_bias", True)
    config.expect("shared_intermediate_size", 0)
    config.expect("attn_type_list", [1] * num_layers(config), limit="full attention in every layer")
    head_dim = config.size("head_dim", default=128)
    rotary = config.size("rotary_dim", default=head_dim, limit=head_dim)
    rope = {"partial": rotary / head_dim, "theta": 5e6}
    mixer = attention(config, rope=rope, qk_norm="flat", head_dim=head_dim)
    router = sigmoid_router(config, renormalise=True)
    routed = experts(config, router, width="intermediate_size", shared_field=None)
    return model(config, NAME, moe_layers(config, mixer, routed))


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    refuse_gguf_features(keys)
    mixer = gguf_attention(keys, partial=True, qk_norm="flat")
    routed = gguf_experts(keys, router=gguf_sigmoid_router(keys))
    return gguf_model(keys, NAME, gguf_layers(keys, mixer, routed))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("MiniMaxM2ForCausalLM",),
    reference="MiniMaxM2ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="minimax-m2",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(
        mlp="block_sparse_moe", expert_parts=("w1", "w3", "w2"), correction="e_score_correction_bias"
    ),
)
