"""GLM-5.3-Flash: Kimi Delta Attention and latent attention over pooled keys, in mixed residual streams."""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.families.glm_moe_dsa import index_kinds
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
from krasis.formats.models.mlps import Activation
from krasis.formats.models.recurrent import ChannelDelta
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import Mixer, ModelSpec, Norm, Residual

NAME = "glm5_next"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("qk_rope_head_dim", 0)
    config.expect("index_kpool_always_select_tail", True)
    limit = config.number("swiglu_limit", default=10.0)
    activation = Activation("silu_clamped_before", limit) if limit else Activation()
    dense = dense_layers(config, 3)
    routed = experts(config, sigmoid_router(config), activation=activation)
    mlp = dense_mlp(config, activation=activation) if any(dense) else None
    eps, rounds = config.number("hc_eps", default=1e-6), config.size("hc_sinkhorn_iters", default=20)
    residual = Residual("hyper", config.size("hc_mult", default=4), "mean", rounds=rounds, eps=eps)
    norm = Norm(config.number("rms_norm_eps", default=1e-5))
    return model(config, NAME, layers_of(_mixers(config), dense, mlp, routed), norm=norm, residual=residual)


def _mixers(config: Config) -> list[Mixer]:
    linear, count = config.child("linear_attn_config"), num_layers(config)
    dim = linear.size("head_dim", default=config.size("linear_head_dim", default=128))
    heads = linear.size("num_heads", default=config.size("linear_num_heads", default=64))
    width = linear.size("short_conv_kernel_size", default=config.size("linear_conv_kernel_dim", default=4))
    bound = linear.number("gate_lower_bound", default=config.number("linear_lower_bound", default=-5.0))
    delta = ChannelDelta(heads, dim, width, dim, dim, bound)
    eps = config.number("rms_norm_eps", default=1e-5)
    attention = latent(config, rotary=None, latent_eps=eps)
    default = ["linear_attention" if i % 4 != 3 else "indexed_attention" for i in range(count)]
    full_names = (
        "full_attention",
        "indexed_attention",
        "deepseek_sparse_attention",
    )  # by version of transformers
    known = {"linear_attention": False} | dict.fromkeys(full_names, True)
    full = config.kinds("layer_types", count, known, default)
    reuses = config.kinds("indexer_types", count, {"full": False, "shared": True}, index_kinds(config))
    return [
        replace(attention, selection=_index(config, again)) if is_full else delta
        for is_full, again in zip(full, reuses, strict=True)
    ]


def _index(config: Config, reuses: bool) -> Selection:
    return Selection(
        "pools",
        heads=config.size("index_n_heads"),
        dim=config.size("index_head_dim"),
        budget=config.size("index_topk"),
        block=config.size("index_kpool", default=16),
        reuses=reuses,
    )


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "glm5_next_text"),
    architectures=("Glm5NextForConditionalGeneration", "Glm5NextForCausalLM"),
    reference="Glm5NextForConditionalGeneration",
    spec_from_hf=spec_from_hf,
    gguf="glm5-next",
    nested=(NAME,),
)
