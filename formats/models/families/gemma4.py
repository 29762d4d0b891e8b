"""Gemma 4 (26B-A4B): two head sizes, values that are the keys, an MLP beside the experts, more norms."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, model, num_layers
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Activation, Experts, GatedMlp, MlpBesideExperts, Router
from krasis.formats.models.spec import Layer, ModelSpec

NAME = "gemma4"
_GELU = Activation("gelu_tanh")


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_activation", "gelu_pytorch_tanh")
    config.expect("attention_bias", False)
    config.expect("num_kv_shared_layers", 0)
    config.expect("use_double_wide_mlp", False)
    if config.size("hidden_size_per_layer_input", default=256, least=0):
        raise config.unsupported("hidden_size_per_layer_input", "inputs of each layer", 0)
    if not config.flag("enable_moe_block"):
        raise config.unsupported("enable_moe_block", "a dense model", "true")
    count = num_layers(config)
    known = {"sliding_attention": _sliding(config), "full_attention": _full(config)}
    default = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(count)]
    mlp = MlpBesideExperts(GatedMlp(config.size("intermediate_size"), _GELU), _experts(config))
    layers = [
        Layer(mixer, mlp, post_norms=True, output_scale=True)
        for mixer in config.kinds("layer_types", count, known, default)
    ]
    cap = config.number("final_logit_softcapping") if config.has("final_logit_softcapping") else None
    scale = config.size("hidden_size") ** 0.5
    return model(config, NAME, layers, tied=True, embedding_scale=scale, logits_cap=cap)


def _sliding(config: Config) -> Attention:
    rope = {"layer_kind": "sliding_attention"}
    window = config.size("sliding_window")
    return attention(config, rope=rope, qk_norm="head", value_norm=True, scale=1.0, window=window)


def _full(config: Config) -> Attention:
    shared = config.flag("attention_k_eq_v")
    own = _overrides(config)
    kv_heads = config.size("num_key_value_heads")
    own_kv_heads = own.size("num_key_value_heads", "num_global_key_value_heads", default=kv_heads)
    return attention(
        config,
        rope={"layer_kind": "full_attention", "kinds": ("default", "proportional")},
        head_dim=own.size("head_dim", "global_head_dim", default=512),
        kv_heads=own_kv_heads if shared else kv_heads,
        qk_norm="head",
        value_norm=True,
        scale=1.0,
        shared_kv=shared,
    )


def _overrides(config: Config) -> Config:
    """What full layers have of their own: by layer as transformers 5 writes it, else in fields beside."""
    by_layer = config.child("per_layer_config")
    for name in by_layer.table:
        return by_layer.child(name)
    fields = ("global_head_dim", "num_global_key_value_heads")
    return Config({name: config.table.get(name) for name in fields}, config.where)


def _experts(config: Config) -> Experts:
    router = Router(config.size("top_k_experts"), input_norm=True, expert_scale=True)
    return Experts(config.size("num_experts"), config.size("moe_intermediate_size"), router, _GELU)


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "gemma4_text"),
    architectures=("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    reference="Gemma4ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="gemma4",
    nested=(NAME,),
)
