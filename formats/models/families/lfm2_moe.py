"""LFM2-MoE: short gated convolutions with a few attention layers, sigmoid router."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    attention,
    dense_mlp,
    experts,
    layers_of,
    model,
    num_layers,
    sigmoid_router,
)
from krasis.formats.models.recurrent import ShortConv
from krasis.formats.models.spec import Mixer, ModelSpec, Norm

NAME = "lfm2_moe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    count, first = num_layers(config), config.size("num_dense_layers", default=2, least=0)
    width = config.size("conv_L_cache", default=3, limit=64)
    known: dict[str, Mixer] = {
        "conv": ShortConv(config.size("hidden_size"), width, config.flag("conv_bias")),
        "full_attention": attention(config, rope={"theta": 1e6}, qk_norm="head"),
    }
    mixers = config.kinds("layer_types", count, known, ["full_attention"] * count)
    bias = config.flag("use_expert_bias", default=True)
    routed = experts(
        config, sigmoid_router(config, correction_bias=bias, sum_epsilon=1e-6), shared_field=None
    )
    dense = [i < first for i in range(count)]
    layers = layers_of(mixers, dense, dense_mlp(config) if any(dense) else None, routed)
    if config.has("tie_embedding"):
        table = {**config.table, "tie_word_embeddings": config.flag("tie_embedding")}
        config = Config(table, config.where)
    return model(config, NAME, layers, norm=Norm(config.number("norm_eps", default=1e-5)), tied=True)


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Lfm2MoeForCausalLM",),
    reference="Lfm2MoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="lfm2moe",
)
