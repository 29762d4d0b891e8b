"""DeepSeek-V3 and what shares its form (Kimi-K2): latent attention, sigmoid router with groups."""

from __future__ import annotations

from krasis.formats.models.drafting import draft_names
from krasis.formats.models.family import VISION, Family
from krasis.formats.models.gguf_latent import deepseek2_from_gguf
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import dense_layers, experts, latent, model, moe_layers, sigmoid_router
from krasis.formats.models.latent_names import latent_decoder_names
from krasis.formats.models.spec import ModelSpec

NAME = "deepseek_v3"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``, or of the language part of one."""
    config.expect("hidden_act", "silu")
    config.expect("moe_layer_freq", 1)
    routed = experts(config, sigmoid_router(config))
    layers = moe_layers(config, latent(config), routed, dense_layers(config, 3))
    return model(config, NAME, layers)


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "kimi_k2", "kimi_k25"),
    architectures=(
        "DeepseekV3ForCausalLM",
        "Kimi_K25ForConditionalGeneration",
        "KimiK25ForConditionalGeneration",
    ),
    reference="DeepseekV3ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="deepseek2",
    spec_from_gguf=deepseek2_from_gguf,
    nested=("kimi_k25",),
    names=latent_decoder_names(nested="language_model."),
    left_out=dict.fromkeys(("vision_tower.", "mm_projector.", "multi_modal_projector."), VISION),
    drafts=draft_names(),
)
