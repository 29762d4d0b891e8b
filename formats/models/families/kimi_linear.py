"""Kimi Linear: Kimi Delta Attention, and latent attention without rotation in every fourth layer."""

from __future__ import annotations

from krasis.formats.models.family import Family
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
from krasis.formats.models.recurrent import ChannelDelta
from krasis.formats.models.spec import Mixer, ModelSpec, Norm

NAME = "kimi_linear"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("mla_use_nope", True)
    config = usual_names(config)
    dense = dense_layers(config, 1)
    routed = experts(config, sigmoid_router(config))
    layers = layers_of(_mixers(config), dense, dense_mlp(config) if any(dense) else None, routed)
    return model(config, NAME, layers, norm=Norm(config.number("rms_norm_eps", default=1e-5)))


_NAMES = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "moe_router_activation_func": "scoring_func",
}


def usual_names(config: Config) -> Config:
    """The config with the hub's own names of fields as the usual ones."""
    return Config({_NAMES.get(key, key): value for key, value in config.table.items()}, config.where)


def _mixers(config: Config) -> list[Mixer]:
    linear, count = config.child("linear_attn_config"), num_layers(config)
    heads = linear.size("num_heads", default=config.size("linear_num_heads", default=32))
    dim = linear.size("head_dim", default=config.size("linear_head_dim", default=128))
    width = linear.size("short_conv_kernel_size", default=config.size("linear_conv_kernel_dim", default=4))
    known: dict[str, Mixer] = {
        "linear_attention": ChannelDelta(heads, dim, width, dim, dim),
        "full_attention": latent(config, rotary=None),
    }
    full = linear.table.get("full_attn_layers")  # numbers from 1
    if full is None:
        full = [i + 1 for i in range(count) if i and i % 4 == 0]
    if not isinstance(full, list) or not all(type(i) is int for i in full):
        raise linear.unsupported("full_attn_layers", full, "a list of layers")
    default = ["full_attention" if i + 1 in set(full) else "linear_attention" for i in range(count)]
    return config.kinds("layer_types", count, known, default)


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("KimiLinearForCausalLM",),
    reference="KimiLinearForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="kimi-linear",
)
