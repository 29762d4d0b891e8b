"""GLM-4.7-Flash: DeepSeek-V3's form at a small size, with one dense layer."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.gguf_latent import deepseek2_from_gguf
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import dense_layers, experts, latent, model, moe_layers, sigmoid_router
from krasis.formats.models.latent_names import latent_decoder_names
from krasis.formats.models.spec import ModelSpec, Norm

NAME = "glm4_moe_lite"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    routed = experts(config, sigmoid_router(config))
    layers = moe_layers(config, latent(config), routed, dense_layers(config, 1))
    return model(config, NAME, layers, norm=Norm(config.number("rms_norm_eps", default=1e-5)))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Glm4MoeLiteForCausalLM",),
    reference="Glm4MoeLiteForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="deepseek2",
    spec_from_gguf=deepseek2_from_gguf,
    names=latent_decoder_names(),
)
