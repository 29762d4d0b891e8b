"""DeepSeek-V3 and what shares its form (Kimi-K2): latent attention, sigmoid router with groups."""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.family import VISION, Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_latent import gguf_latent_model, gguf_latent_router, is_sigmoid
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import dense_layers, experts, latent, model, moe_layers, sigmoid_router
from krasis.formats.models.latent_names import latent_decoder_names
from krasis.formats.models.spec import ModelSpec

NAME = "deepseek_v3"
_GLM_VOCAB = 154_880


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``, or of the language part of one."""
    config.expect("hidden_act", "silu")
    config.expect("moe_layer_freq", 1)
    routed = experts(config, sigmoid_router(config))
    layers = moe_layers(config, latent(config), routed, dense_layers(config, 3))
    return model(config, NAME, layers)


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. llama.cpp has one architecture for all of this form: a softmax is
    DeepSeek-V2's, and GLM-4.7-Flash is known by its vocabulary.
    """
    spec = gguf_latent_model(keys, NAME, gguf_latent_router(keys, by_best_two=False))
    if not is_sigmoid(keys):
        return replace(spec, family="deepseek_v2")
    return replace(spec, family="glm4_moe_lite") if spec.vocab == _GLM_VOCAB else spec


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
    spec_from_gguf=spec_from_gguf,
    nested=("kimi_k25",),
    names=latent_decoder_names(nested="language_model."),
    left_out=dict.fromkeys(("vision_tower.", "mm_projector.", "multi_modal_projector."), VISION),
)
