"""GLM-5: DeepSeek-V3.2's form; some layers reuse the choice of the one before."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from krasis.formats.models.families.deepseek_v32 import token_index
from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_latent import gguf_indexed_model
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    dense_layers,
    dense_mlp,
    experts,
    latent,
    layers_of,
    model,
    num_layers,
    sigmoid_router,
)
from krasis.formats.models.latent_names import latent_decoder_names
from krasis.formats.models.spec import Mixer, ModelSpec, Norm

NAME = "glm_moe_dsa"
_CONTEXT_OF_5_2 = 1_048_576


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("mlp_bias", False)
    dense = dense_layers(config, 3)
    routed = experts(config, sigmoid_router(config))
    layers = layers_of(_mixers(config), dense, dense_mlp(config) if any(dense) else None, routed)
    return model(config, NAME, layers, norm=Norm(config.number("rms_norm_eps", default=1e-5)))


def _mixers(config: Config) -> list[Mixer]:
    base, count = latent(config), num_layers(config)
    style: Literal["half", "interleaved"] = (
        "half" if not config.flag("indexer_rope_interleave", default=True) else "interleaved"
    )
    known: dict[str, Mixer] = {
        kind: replace(base, selection=token_index(config, style, reuses=kind == "shared"))
        for kind in ("full", "shared")
    }
    return config.kinds("indexer_types", count, known, index_kinds(config))


def index_kinds(config: Config) -> list[str]:
    """Which layers have an index of their own, where ``indexer_types`` does not say it."""
    count, pattern = num_layers(config), config.table.get("index_topk_pattern")
    if isinstance(pattern, str) and len(pattern) >= count:
        return ["full" if letter == "F" else "shared" for letter in pattern[:count]]
    every = config.size("index_topk_freq", default=1, least=0) or 1
    first = config.size("index_skip_topk_offset", default=2, least=0)
    return ["full" if max(0, i - first + 1) % every == 0 else "shared" for i in range(count)]


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. Files that do not say which layers have an index of their own are
    GLM-5's and 5.1's, where all have, or GLM-5.2's, which its context tells."""
    count = keys.size("block_count")
    main = count - keys.size("nextn_predict_layers", default=0, least=0)
    types: list[bool] = [True] * main
    if keys.has("attention.indexer.types"):
        types = keys.by_layer("attention.indexer.types", main, bool)
    elif keys.size("context_length") >= _CONTEXT_OF_5_2:
        types = [max(0, i - 2) % 4 == 0 for i in range(main)]
    return gguf_indexed_model(keys, NAME, "interleaved", types)


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("GlmMoeDsaForCausalLM",),
    reference="GlmMoeDsaForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="glm-dsa",
    spec_from_gguf=spec_from_gguf,
    names=latent_decoder_names(),
)
