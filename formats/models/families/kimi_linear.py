"""Kimi Linear: Kimi Delta Attention, and latent attention without rotation in every fourth layer."""

from __future__ import annotations

from dataclasses import replace

from krasis.formats.models.family import Family, Source
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    gguf_experts,
    gguf_layers_of,
    gguf_model,
    gguf_sigmoid_router,
    refuse_gguf_features,
)
from krasis.formats.models.gguf_latent import gguf_latent
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
from krasis.formats.models.names import PARTS
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


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. Layers of the delta rule have no heads of keys and values. llama.cpp
    divides by the sum of the weights, and rotates nothing, whatever the metadata says."""
    refuse_gguf_features(keys)
    keys.expect("expert_weights_norm", True)
    heads, dim = keys.size("attention.head_count"), keys.size("kda.head_dim")
    delta = ChannelDelta(heads, dim, keys.size("ssm.conv_kernel"), dim, dim)
    attention = replace(gguf_latent(keys), rope=None)
    kv_heads = keys.by_layer("attention.head_count_kv", keys.size("block_count"), int)
    mixers = [attention if count else delta for count in kv_heads]
    routed = gguf_experts(keys, router=gguf_sigmoid_router(keys))
    return gguf_model(keys, NAME, gguf_layers_of(keys, mixers, routed))


_DELTA = {
    "q": ("q_proj.weight", "attn_q.weight"),
    "k": ("k_proj.weight", "attn_k.weight"),
    "v": ("v_proj.weight", "attn_v.weight"),
    "conv_q": ("q_conv1d.weight", "ssm_conv1d_q.weight"),
    "conv_k": ("k_conv1d.weight", "ssm_conv1d_k.weight"),
    "conv_v": ("v_conv1d.weight", "ssm_conv1d_v.weight"),
    "decay_a": ("f_a_proj.weight", "ssm_f_a.weight"),
    "decay_b": ("f_b_proj.weight", "ssm_f_b.weight"),
    "gate_a": ("g_a_proj.weight", "ssm_g_a.weight"),
    "gate_b": ("g_b_proj.weight", "ssm_g_b.weight"),
    "beta": ("b_proj.weight", "ssm_beta.weight"),
    "a_log": ("A_log", "ssm_a"),
    "dt_bias": ("dt_bias", "ssm_dt.bias"),
    "gate_norm": ("o_norm.weight", "ssm_norm.weight"),
    "output": ("o_proj.weight", "attn_output.weight"),
}


def channel_delta_names(layer: str) -> dict[str, Source]:
    """The tensors of Kimi Delta Attention. layer: before the hub's names."""
    names = {
        f"delta.{ours}": Source((f"{layer}self_attn.{hf}",), (f"blk.{{i}}.{gguf}",))
        for ours, (hf, gguf) in _DELTA.items()
    }
    names["delta.a_log"] = replace(names["delta.a_log"], gguf_transform="log_of_negative")
    return names


def _names() -> dict[str, Source]:
    names = dict(latent_decoder_names(mlp="block_sparse_moe", expert_parts=("w1", "w3", "w2")))
    for part in PARTS:  # transformers writes those of dense layers under the experts' name
        known = names[f"mlp.{part}_proj"]
        also = known.hf[0].replace(".mlp.", ".block_sparse_moe.")
        names[f"mlp.{part}_proj"] = replace(known, hf=(*known.hf, also))
    return names | channel_delta_names("model.layers.{i}.")


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("KimiLinearForCausalLM",),
    reference="KimiLinearForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="kimi-linear",
    spec_from_gguf=spec_from_gguf,
    names=_names(),
)
