"""dots.llm1: GLM-4's experts with norms of q and k by head."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    gguf_attention,
    gguf_experts,
    gguf_layers,
    gguf_model,
    gguf_sigmoid_router,
    refuse_gguf_features,
)
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    attention,
    dense_layers,
    experts,
    model,
    moe_layers,
    num_layers,
    sigmoid_router,
)
from krasis.formats.models.names import CORRECTION, decoder_names
from krasis.formats.models.spec import ModelSpec

NAME = "dots1"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False)
    count = num_layers(config)
    config.kinds("layer_types", count, {"full_attention": None}, ["full_attention"] * count)
    mixer = attention(config, qk_norm="head", bias=config.flag("attention_bias"))
    config.expect("scoring_func", "sigmoid", "noaux_tc")  # released files name the method there
    table = Config({**config.table, "scoring_func": "sigmoid"}, config.where)
    router = sigmoid_router(table, renormalise=config.flag("norm_topk_prob"))
    return model(config, NAME, moe_layers(config, mixer, experts(config, router), dense_layers(config)))


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    refuse_gguf_features(keys)
    mixer = gguf_attention(keys, qk_norm="head", bias="blk.0.attn_q.bias" in keys.tensors)
    routed = gguf_experts(keys, router=gguf_sigmoid_router(keys))
    return gguf_model(keys, NAME, gguf_layers(keys, mixer, routed))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Dots1ForCausalLM",),
    reference="Dots1ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="dots1",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(biases=True, shared="shared_experts", dense=True, correction=CORRECTION),
)
