"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, a shared expert behind a gate."""

from __future__ import annotations

from krasis.formats.models.delta_names import delta_names, hybrid_names
from krasis.formats.models.family import DRAFTING, Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import (
    attention,
    dense_mlp,
    experts,
    layers_of,
    model,
    num_layers,
    qwen_dense_layers,
    softmax_router,
)
from krasis.formats.models.hf_rope import MROPE
from krasis.formats.models.mlps import Experts, GatedMlp
from krasis.formats.models.recurrent import GatedDelta
from krasis.formats.models.spec import Mixer, ModelSpec

NAME = "qwen3_next"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    dense = qwen_dense_layers(config)
    mlp = dense_mlp(config) if any(dense) else None
    routed = gated_shared_experts(config, renormalise=config.flag("norm_topk_prob", default=True))
    return model(config, NAME, layers_of(hybrid_mixers(config), dense, mlp, routed))


def gated_shared_experts(config: Config, renormalise: bool = True) -> Experts:
    """Experts with a shared one behind a gate."""
    shared = GatedMlp(config.size("shared_expert_intermediate_size"))
    router = softmax_router(config, renormalise=renormalise)
    return experts(config, router, shared=shared, shared_gate=True)


def hybrid_mixers(config: Config) -> list[Mixer]:
    """Gated DeltaNet, and gated attention in every ``full_attention_interval``-th layer."""
    full = attention(
        config,
        rope={"partial": 0.25, "ignored": MROPE},
        qk_norm="head",
        output_gate="channel",
        bias=config.flag("attention_bias"),
        output_bias=config.flag("attention_bias"),
    )
    interval = config.size("full_attention_interval", default=4)
    count = num_layers(config)
    default = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    known = {"linear_attention": gated_delta(config), "full_attention": full}
    return config.kinds("layer_types", count, known, default)


def gated_delta(config: Config) -> GatedDelta:
    """Gated DeltaNet by the usual fields."""
    return GatedDelta(
        config.size("linear_num_key_heads"),
        config.size("linear_num_value_heads"),
        config.size("linear_key_head_dim"),
        config.size("linear_value_head_dim"),
        config.size("linear_conv_kernel_dim"),
    )


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Qwen3NextForCausalLM",),
    reference="Qwen3NextForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="qwen3next",
    names=hybrid_names("model.", dense=True) | delta_names(("model.",), fused=True),
    left_out={"mtp.": DRAFTING},
)
