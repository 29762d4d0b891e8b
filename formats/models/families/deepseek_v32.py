"""DeepSeek-V3.2: DeepSeek-V3 with an index that picks the tokens a query attends to."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_latent import gguf_indexed_model
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import dense_layers, experts, latent, model, moe_layers, sigmoid_router
from krasis.formats.models.hf_rope import read_rope
from krasis.formats.models.latent_names import latent_decoder_names
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import ModelSpec

NAME = "deepseek_v32"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("moe_layer_freq", 1)
    config.expect("mlp_bias", False)
    mixer = replace(latent(config), selection=token_index(config, "half"))
    routed = experts(config, sigmoid_router(config))
    return model(config, NAME, moe_layers(config, mixer, routed, dense_layers(config, 3)))


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    return gguf_indexed_model(keys, NAME, "half")


def token_index(config: Config, style: Literal["half", "interleaved"], reuses: bool = False) -> Selection:
    """The index over tokens by the usual fields. style: of its rotation."""
    return Selection(
        "tokens",
        heads=config.size("index_n_heads"),
        dim=config.size("index_head_dim"),
        budget=config.size("index_topk"),
        rope=read_rope(config, config.size("qk_rope_head_dim"), style=style),
        reuses=reuses,
    )


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("DeepseekV32ForCausalLM",),
    reference="DeepseekV32ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="deepseek32",
    spec_from_gguf=spec_from_gguf,
    names=latent_decoder_names(),
)
