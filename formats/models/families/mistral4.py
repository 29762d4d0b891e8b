"""Mistral Small 4: latent attention whose queries grow with the position, softmax router."""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.family import VISION, Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_latent import gguf_latent_model, gguf_latent_router
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import dense_layers, experts, latent, model, moe_layers, softmax_router
from krasis.formats.models.hf_rope import rope_table
from krasis.formats.models.latent_names import latent_decoder_names
from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.rope import QueryTemperature
from krasis.formats.models.spec import ModelSpec

NAME = "mistral4"
_BETA = "llama_4_scaling_beta"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_act", "silu")
    router = softmax_router(
        config,
        renormalise=config.flag("norm_topk_prob", default=True),
        scale=config.number("routed_scaling_factor", default=1.0),
        groups=config.size("n_group", default=1),
        top_groups=config.size("topk_group", default=1),
    )
    layers = moe_layers(config, _attention(config), experts(config, router), dense_layers(config))
    return model(config, NAME, layers)


def _attention(config: Config) -> LatentAttention:
    table = rope_table(config)
    rope_dim, head_dim = config.size("qk_rope_head_dim"), config.size("qk_nope_head_dim")
    head_dim += rope_dim
    ignored = frozenset({_BETA, "max_position_embeddings"})
    rope = {"head_dim": head_dim, "partial": rope_dim / head_dim, "ignored": ignored}
    mixer = latent(config, rope=rope)
    beta = table.number(_BETA, default=0.0)
    if not beta:
        return mixer
    period = table.size("original_max_position_embeddings")
    return replace(mixer, temperature=QueryTemperature(beta, period))


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    return gguf_latent_model(keys, NAME, gguf_latent_router(keys, by_best_two=True))


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "mistral3"),
    architectures=("Mistral4ForCausalLM", "Mistral3ForConditionalGeneration"),
    reference="Mistral4ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="mistral4",
    spec_from_gguf=spec_from_gguf,
    nested=("mistral3",),
    names=latent_decoder_names(correction=False, nested="language_model."),
    left_out=dict.fromkeys(("vision_tower.", "multi_modal_projector.", "model.vision_tower."), VISION),
)
