"""Laguna: windows with more heads, softplus gates on attention's output, a shared expert."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, num_layers, sigmoid_router
from krasis.formats.models.mixers import Attention, OutputGate
from krasis.formats.models.mlps import Experts, GatedMlp
from krasis.formats.models.spec import Layer, ModelSpec

NAME = "laguna"
_KINDS = {"full_attention": (500_000.0, 0.5), "sliding_attention": (10_000.0, 1.0)}  # theta, rotated part


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    count = num_layers(config)
    kinds = config.kinds("layer_types", count, {kind: kind for kind in _KINDS}, ["full_attention"] * count)
    heads = config.sizes("num_attention_heads_per_layer", count, config.size("num_attention_heads"))
    default = ["sparse" if i else "dense" for i in range(count)]
    sparse = config.kinds("mlp_layer_types", count, {"sparse": True, "dense": False}, default)
    mlp, routed = GatedMlp(config.size("intermediate_size")), _experts(config)
    layers = [
        Layer(_attention(config, kinds[i], heads[i]), routed if sparse[i] else mlp) for i in range(count)
    ]
    return model(config, NAME, layers)


def _attention(config: Config, kind: str, heads: int) -> Attention:
    theta, partial = _KINDS[kind]
    window = config.size("sliding_window", default=512) if kind == "sliding_attention" else None
    rope = {"layer_kind": kind, "theta": theta, "partial": partial}
    return attention(config, heads=heads, rope=rope, qk_norm="head", output_gate=_gate(config), window=window)


def _gate(config: Config) -> OutputGate:
    config.expect("gating", True, "per-head", "per-element", "per-channel")
    value = config.table.get("gating", True)
    return "head_softplus" if value in (True, "per-head") else "channel_softplus"


def _experts(config: Config) -> Experts:
    scale = config.number("moe_routed_scaling_factor", default=1.0)
    cap = config.number("moe_router_logit_softcapping", default=0.0)
    router = sigmoid_router(config, scale=scale, logit_cap=cap or None)
    weigh_input = config.flag("moe_apply_router_weight_on_input")
    shared = GatedMlp(config.size("shared_expert_intermediate_size"))
    return experts(config, router, shared_field=None, shared=shared, weigh_input=weigh_input)


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("LagunaForCausalLM",),
    reference="LagunaForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="laguna",
)
