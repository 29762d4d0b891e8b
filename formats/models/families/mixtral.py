"""Mixtral: plain grouped-query attention, few wide experts in every layer."""

from __future__ import annotations

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import gguf_attention, gguf_experts, gguf_model, refuse_gguf_features
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, moe_layers, softmax_router
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import Layer, ModelSpec, Norm

NAME = "mixtral"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    mixer = attention(config, rope={"theta": 1e6}, window=config.optional_size("sliding_window"))
    router = softmax_router(config, renormalise=True)
    routed = experts(config, router, width="intermediate_size", shared_field=None)
    norm = Norm(config.number("rms_norm_eps", default=1e-5))
    return model(config, NAME, moe_layers(config, mixer, routed), norm=norm)


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    if not keys.has("expert_count"):
        raise UnsupportedModelError(
            "a dense model: only models with experts are supported",
            where=f"{keys.where}: general.architecture",
            got="'llama'",
            limit="models with experts",
        )
    refuse_gguf_features(keys, "expert_weights_scale", "leading_dense_block_count", "expert_shared_count")
    width = "expert_feed_forward_length" if keys.has("expert_feed_forward_length") else "feed_forward_length"
    routed = gguf_experts(keys, width=width, renormalise=keys.flag("expert_weights_norm", default=True))
    return gguf_model(keys, NAME, [Layer(gguf_attention(keys), routed)] * keys.size("block_count"))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("MixtralForCausalLM",),
    reference="MixtralForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="llama",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(
        mlp="block_sparse_moe", expert_parts=("w1", "w3", "w2"), qk_norm=False, permuted=True
    ),
)
