"""Hunyuan-A13B: norms of q and k after the rotation, one shared expert of the dense width."""

from __future__ import annotations

from krasis.formats.models.family import Family, Source
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import gguf_attention, gguf_experts, gguf_model, refuse_gguf_features
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, model, num_layers
from krasis.formats.models.hf_rope import read_rope, rope_table
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Experts, GatedMlp, Router
from krasis.formats.models.names import decoder_names
from krasis.formats.models.rope import Rope
from krasis.formats.models.spec import Layer, ModelSpec, Norm

NAME = "hunyuan_v1_moe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``; sizes may be lists with one entry a layer."""
    config.expect("hidden_act", "silu")
    config.expect("use_qk_norm", True)
    config.expect("use_mixed_mlp_moe", True)
    config.expect("use_cla", False)
    count = num_layers(config)
    mixer = _attention(config)
    width = config.size("intermediate_size")
    top = config.sizes("moe_topk", count, 1)
    widths = config.sizes("moe_intermediate_size", count, width)
    shared = config.sizes("num_shared_expert", count, 1)
    number = config.size("num_experts", "num_local_experts")
    layers = [
        Layer(mixer, Experts(number, widths[i], Router(top[i]), shared=GatedMlp(width * shared[i])))
        for i in range(count)
    ]
    return model(config, NAME, layers, norm=Norm(config.number("rms_norm_eps", default=1e-5)))


def _attention(config: Config) -> Attention:
    bias = config.flag("attention_bias")
    return attention(config, qk_norm="head_after_rope", rotary=_rope(config), bias=bias, output_bias=bias)


def _rope(config: Config) -> Rope:
    """A ``dynamic`` scaling with ``alpha`` is a larger theta."""
    head_dim = config.size(
        "head_dim", default=max(1, config.size("hidden_size") // config.size("num_attention_heads"))
    )
    table = rope_table(config)
    if table.table.get("rope_type", table.table.get("type")) != "dynamic" or not table.table.get("alpha"):
        return read_rope(config, head_dim)
    theta = table.number("rope_theta", default=config.number("rope_theta", default=10_000.0))
    alpha = table.number("alpha")
    if head_dim <= 2 or not 0 < alpha < 1e9:
        raise table.unsupported("alpha", alpha, "above 0")
    return Rope(head_dim, theta * alpha ** (head_dim / (head_dim - 2)))


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata, whose frequency base has the scaling in it."""
    refuse_gguf_features(keys, "expert_weights_scale", "leading_dense_block_count")
    count = keys.size("expert_shared_count", default=1)
    shared = GatedMlp(keys.size("expert_shared_feed_forward_length") * count)
    mixer = gguf_attention(keys, qk_norm="head_after_rope")
    return gguf_model(
        keys, NAME, [Layer(mixer, gguf_experts(keys, shared=shared))] * keys.size("block_count")
    )


def _names() -> dict[str, Source]:
    names = decoder_names(biases=True, router="gate.wg", shared="shared_mlp")
    layer = "model.layers.{i}.self_attn."
    for ours, hf in (("q", "query"), ("k", "key")):
        name = f"attention.{ours}_norm"
        names[name] = Source((f"{layer}{hf}_layernorm.weight",), names[name].gguf)
    names["attention.output.bias"] = Source((f"{layer}o_proj.bias",), ("blk.{i}.attn_output.bias",))
    return names


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "hunyuan"),
    architectures=("HunYuanMoEV1ForCausalLM",),
    reference="HunYuanMoEV1ForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="hunyuan-moe",
    spec_from_gguf=spec_from_gguf,
    names=_names(),
)
