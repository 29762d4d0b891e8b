"""MiniMax-M3: clamped SwiGLU everywhere, attention to the best blocks of keys, a shared expert."""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    attention,
    experts,
    layers_of,
    model,
    num_layers,
    one_plus,
    sigmoid_router,
)
from krasis.formats.models.mlps import Activation, GatedMlp
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import Mixer, ModelSpec

NAME = "minimax_m3"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_act", "silu", "swigluoai")
    limit, alpha = config.number("swiglu_limit", default=7.0), config.number("swiglu_alpha", default=1.702)
    activation = Activation("swiglu_offset", limit, alpha)
    count = num_layers(config)
    frequency = config.items("moe_layer_freq", count) or [1] * count
    default = ["sparse" if entry else "dense" for entry in frequency]
    dense = config.kinds("mlp_layer_types", count, {"dense": True, "sparse": False}, default)
    shared = GatedMlp(config.size("shared_intermediate_size"), activation)
    scale = config.number("routed_scaling_factor", default=2.0)
    routed = experts(
        config,
        sigmoid_router(config, renormalise=True, scale=scale),
        width="intermediate_size",
        activation=activation,
        shared_field=None,
        shared=shared,
    )
    mlp = GatedMlp(config.size("dense_intermediate_size"), activation)
    return model(config, NAME, layers_of(_mixers(config, count), dense, mlp, routed), norm=one_plus(config))


def _mixers(config: Config, count: int) -> list[Mixer]:
    head_dim = config.size("head_dim", default=128)
    rotary = config.size("rotary_dim", default=max(1, head_dim // 2), limit=head_dim)
    full = attention(
        config, rope={"partial": rotary / head_dim, "theta": 5e6}, qk_norm="head", head_dim=head_dim
    )
    older = config.child("sparse_attention_config")
    block = older.size("sparse_block_size", default=config.size("index_block_size", default=128))
    blocks = older.size("sparse_topk_blocks", default=config.size("index_topk_blocks", default=16))
    index = Selection(
        "block_max",
        heads=older.size("sparse_num_index_heads", default=config.size("index_n_heads", default=4)),
        dim=older.size("sparse_index_dim", default=config.size("index_head_dim", default=128)),
        budget=block * blocks,
        block=block,
        rope=full.rope,
    )
    known: dict[str, Mixer] = {
        "full_attention": full,
        "minimax_m3_sparse": replace(full, selection=index),
    }
    frequency = older.items("sparse_attention_freq", count) or [0] * count
    default = ["minimax_m3_sparse" if entry else "full_attention" for entry in frequency]
    return config.kinds("layer_types", count, known, default)


FAMILY = Family(
    name=NAME,
    model_types=("minimax_m3_vl", "minimax_m3_vl_text", NAME),
    architectures=(
        "MiniMaxM3VLForConditionalGeneration",
        "MiniMaxM3SparseForConditionalGeneration",
        "MiniMaxM3VLForCausalLM",
    ),
    reference="MiniMaxM3VLForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="minimax-m3",
    nested=("minimax_m3_vl",),
)
