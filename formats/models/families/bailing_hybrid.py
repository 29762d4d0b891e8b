"""Ling 3: five layers of Kimi Delta Attention to one of latent attention with a gate a head."""

from __future__ import annotations

from krasis.formats.models.families.kimi_linear import usual_names
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
from krasis.formats.models.spec import Mixer, ModelSpec

NAME = "bailing_hybrid"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config = usual_names(config)
    dense = dense_layers(config, 2)
    routed = experts(config, sigmoid_router(config))
    layers = layers_of(_mixers(config), dense, dense_mlp(config) if any(dense) else None, routed)
    return model(config, NAME, layers)


def _mixers(config: Config) -> list[Mixer]:
    count, group = num_layers(config), config.size("layer_group_size", default=6)
    # transformers writes the rotary part's size as head_dim and the delta rule's apart.
    dim = config.size("linear_head_dim", "head_dim", default=128)
    heads = config.size("linear_num_heads", "num_attention_heads")
    width = config.size("linear_conv_kernel_dim", "short_conv_kernel_size", default=4)
    bound = (
        config.number("kda_lower_bound", default=-5.0) if config.flag("kda_safe_gate", default=True) else None
    )
    known: dict[str, Mixer] = {
        "linear_attention": ChannelDelta(heads, dim, width, None, None, bound),
        "full_attention": latent(config, head_gate=True, rope={"theta": 6e6}),
    }
    default = ["linear_attention" if (i + 1) % group else "full_attention" for i in range(count)]
    return config.kinds("layer_types", count, known, default)


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("BailingHybridForCausalLM",),
    reference="BailingHybridForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="bailingmoe3",
)
