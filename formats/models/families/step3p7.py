"""Step-3.5 and 3.7 Flash: windows with more heads, gates a head, SwiGLU that some layers clamp."""

from __future__ import annotations

from typing import Any

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, num_layers, one_plus, sigmoid_router
from krasis.formats.models.hf_rope import read_rope
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Activation, GatedMlp
from krasis.formats.models.rope import Rope
from krasis.formats.models.spec import Layer, Mlp, ModelSpec

NAME = "step3p7"
_NAMES = {
    "num_attention_groups": "num_key_value_heads",
    "moe_num_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "share_expert_dims": "share_expert_dim",
    "norm_expert_weight": "norm_topk_prob",
}
_SLIDING = "sliding_attention"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config = Config({_NAMES.get(key, key): value for key, value in config.table.items()}, config.where)
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    config.expect("use_head_wise_attn_gate", True)
    config.expect("moe_router_activation", "sigmoid")
    count = num_layers(config)
    kinds = config.kinds(
        "layer_types",
        count,
        {kind: kind for kind in (_SLIDING, "full_attention")},
        ["full_attention"] * count,
    )
    sparse = _sparse_layers(config, count)
    limits = config.numbers("swiglu_limits", count, 0.0)
    shared = config.numbers("swiglu_limits_shared", count, 0.0)
    layers = [
        Layer(_attention(config, kinds[i], i), _mlp(config, sparse[i], limits[i], shared[i]))
        for i in range(count)
    ]
    return model(config, NAME, layers, norm=one_plus(config))


def _sparse_layers(config: Config, count: int) -> list[bool]:
    named = config.table.get("moe_layers_enum")
    if isinstance(named, str):
        named = [int(part) for part in named.split(",") if part.strip().isdecimal() and len(part) < 9]
    if named is None:
        named = list(range(3, count))
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        raise config.unsupported("moe_layers_enum", named, "a list of layers")
    alone = set(named)
    default = ["sparse" if i in alone else "dense" for i in range(count)]
    return config.kinds("mlp_layer_types", count, {"sparse": True, "dense": False}, default)


def _attention(config: Config, kind: str, layer: int) -> Attention:
    sliding = kind == _SLIDING
    other = config.child("attention_other_setting")
    heads = config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads")
    if sliding:
        heads = config.size(
            "num_sliding_attention_heads", default=other.size("num_attention_heads", default=heads)
        )
        kv_heads = other.size("num_attention_groups", default=kv_heads)
    return attention(
        config,
        heads=heads,
        kv_heads=kv_heads,
        rotary=_rope(config, kind, layer),
        qk_norm="head",
        output_gate="head",
        window=config.size("sliding_window", default=512) if sliding else None,
    )


def _rope(config: Config, kind: str, layer: int) -> Rope:
    """By layer type, or by lists with one entry a layer; only full layers are scaled."""
    table: dict[str, Any] = dict(config.table)
    for name, single in (("rope_theta", "rope_theta"), ("partial_rotary_factors", "partial_rotary_factor")):
        values = config.table.get(name)
        if isinstance(values, list):
            table[single] = (config.items(name, num_layers(config)) or [])[layer]
    if kind == _SLIDING and "rope_scaling" in table:
        del table["rope_scaling"]
    own = Config(table, config.where)
    head_dim = config.size("head_dim")
    return read_rope(own, head_dim, layer_kind=kind, kinds=("default", "llama3", "yarn", "linear"))


def _mlp(config: Config, sparse: bool, limit: float, shared_limit: float) -> Mlp:
    plain = _activation(shared_limit)
    if not sparse:
        return GatedMlp(config.size("intermediate_size"), plain)
    router = sigmoid_router(config, scale=config.number("moe_router_scaling_factor", default=1.0))
    shared = GatedMlp(config.size("share_expert_dim"), plain)
    return experts(config, router, activation=_activation(limit), shared_field=None, shared=shared)


def _activation(limit: float) -> Activation:
    return Activation("silu_clamped_after", limit) if limit else Activation()


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "step3p5", "step3p7_text"),
    architectures=("Step3p7ForConditionalGeneration", "Step3p5ForCausalLM"),
    reference="Step3p7ForConditionalGeneration",
    spec_from_hf=spec_from_hf,
    gguf="step35",
    nested=(NAME,),
)
