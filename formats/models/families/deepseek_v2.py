"""DeepSeek-V2: latent attention, softmax router that may choose groups by their best expert."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.gguf_latent import deepseek2_from_gguf
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import dense_layers, experts, latent, model, moe_layers, softmax_router
from krasis.formats.models.latent_names import latent_decoder_names
from krasis.formats.models.spec import ModelSpec

NAME = "deepseek_v2"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("scoring_func", "softmax")
    config.expect("moe_layer_freq", 1)
    config.expect("norm_topk_prob", False)
    grouped = config.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    router = softmax_router(
        config,
        renormalise=False,
        scale=config.number("routed_scaling_factor", default=1.0),
        groups=config.size("n_group") if grouped else 1,
        top_groups=config.size("topk_group") if grouped else 1,
        group_score="best",
    )
    layers = moe_layers(config, latent(config), experts(config, router), dense_layers(config))
    return model(config, NAME, layers)


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("DeepseekV2ForCausalLM",),
    reference="DeepseekV2ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="deepseek2",
    spec_from_gguf=deepseek2_from_gguf,
    names=latent_decoder_names(correction=False),
)
