"""Hunyuan 3: norms of q and k by head, sigmoid router with a correction bias, one dense layer."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    gguf_attention,
    gguf_experts,
    gguf_model,
    gguf_sigmoid_router,
    refuse_gguf_features,
)
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    attention,
    dense_layers,
    experts,
    layers_of,
    model,
    moe_layers,
    sigmoid_router,
)
from krasis.formats.models.mlps import GatedMlp
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import ModelSpec, Norm

NAME = "hy_v3"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    config.expect("mlp_bias", False)
    config.expect("route_norm", True)
    mixer = attention(config, qk_norm="head", rope={"theta": 11_158_840.0})
    scale = config.number("router_scaling_factor", "routed_scaling_factor", default=2.826)
    routed = experts(config, sigmoid_router(config, scale=scale), shared_field="num_shared_experts")
    norm = Norm(config.number("rms_norm_eps", default=1e-5))
    return model(config, NAME, moe_layers(config, mixer, routed, dense_layers(config, 1)), norm=norm)


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. Which layers are dense only the tensors say."""
    refuse_gguf_features(keys)
    mixer = gguf_attention(keys, qk_norm="head")
    width = keys.size("expert_feed_forward_length")
    shared = keys.size("expert_shared_feed_forward_length", default=width, least=0)
    router = gguf_sigmoid_router(keys)
    routed = gguf_experts(keys, router=router, shared=GatedMlp(shared) if shared else None)
    count = keys.size("block_count") - keys.size("nextn_predict_layers", default=0, least=0)
    dense = [f"blk.{i}.ffn_gate_inp.weight" not in keys.tensors for i in range(count)]
    mlp = GatedMlp(keys.size("feed_forward_length")) if any(dense) else None
    return gguf_model(keys, NAME, layers_of([mixer] * count, dense, mlp, routed))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("HYV3ForCausalLM",),
    reference="HYV3ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="hy_v3",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(router="router.gate", shared="shared_mlp", dense=True, correction="expert_bias"),
)
