"""GLM-5.3-Flash: Kimi Delta Attention and latent attention over pooled keys, in mixed residual streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from krasis.formats.models.families.glm_moe_dsa import index_kinds
from krasis.formats.models.families.kimi_linear import channel_delta_names
from krasis.formats.models.family import VISION, Family, Source
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    gguf_experts,
    gguf_model,
    gguf_sigmoid_router,
    refuse_gguf_features,
)
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
from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.mlps import Activation, GatedMlp
from krasis.formats.models.recurrent import ChannelDelta
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import Mixer, ModelSpec, Norm, Residual

NAME = "glm5_next"
_FULL = ("full_attention", "indexed_attention", "deepseek_sparse_attention")  # by version of transformers


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of the language part of a ``config.json``."""
    config.expect("hidden_act", "silu")
    config.expect("qk_rope_head_dim", 0)
    for flag in ("index_kpool_always_select_tail", "index_kpool_compress", "mla_use_nope", "mhc"):
        config.expect(flag, True)
    activation = _activation(config.number("swiglu_limit", default=10.0))
    dense = dense_layers(config, 3)
    routed = experts(config, sigmoid_router(config), activation=activation)
    mlp = dense_mlp(config, activation=activation) if any(dense) else None
    eps, rounds = config.number("hc_eps", default=1e-6), config.size("hc_sinkhorn_iters", default=20)
    residual = Residual("hyper", config.size("hc_mult", default=4), "mean", rounds=rounds, eps=eps)
    norm = Norm(config.number("rms_norm_eps", default=1e-5))
    return model(config, NAME, layers_of(_mixers(config), dense, mlp, routed), norm=norm, residual=residual)


def _activation(limit: float) -> Activation:
    return Activation("silu_clamped_before", limit) if limit else Activation()


def _mixers(config: Config) -> list[Mixer]:
    linear, count = config.child("linear_attn_config"), num_layers(config)
    dim = linear.size("head_dim", default=config.size("linear_head_dim", default=128))
    heads = linear.size("num_heads", default=config.size("linear_num_heads", default=64))
    width = linear.size("short_conv_kernel_size", default=config.size("linear_conv_kernel_dim", default=4))
    delta = ChannelDelta(heads, dim, width, dim, dim, _lower_bound(config, linear))
    eps = config.number("rms_norm_eps", default=1e-5)
    attention = latent(config, rotary=None, latent_eps=eps)
    default = ["linear_attention" if i % 4 != 3 else "indexed_attention" for i in range(count)]
    known = {"linear_attention": False} | dict.fromkeys(_FULL, True)
    full = config.kinds("layer_types", count, known, default)
    reuses = config.kinds("indexer_types", count, {"full": False, "shared": True}, index_kinds(config))
    return [
        replace(attention, selection=_index(config, again)) if is_full else delta
        for is_full, again in zip(full, reuses, strict=True)
    ]


def _lower_bound(config: Config, linear: Config) -> float | None:
    """Of the decays' logarithms. A null says that there is none, unless the gate is to be a safe one."""
    for table, name in ((linear, "gate_lower_bound"), (config, "linear_lower_bound")):
        if table.has(name):
            return table.number(name)
        if name in table.table:
            safe = linear.table and linear.flag("safe_gate", default=True)
            return -5.0 if safe else None
    return -5.0


def _index(config: Config, reuses: bool) -> Selection:
    return Selection(
        "pools",
        heads=config.size("index_n_heads", default=32),
        dim=config.size("index_head_dim", default=128),
        budget=config.size("index_topk", default=2048),
        block=config.size("index_kpool", default=16),
        reuses=reuses,
    )


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata. Layers of the delta rule have no heads of keys and values."""
    refuse_gguf_features(keys)
    keys.expect("rope.dimension_count", 0)
    keys.expect("attention.indexer.kpool_select_tail", True)
    blocks = keys.size("block_count")
    count = blocks - keys.size("nextn_predict_layers", default=0, least=0)
    activation = _activation(_gguf_limit(keys, count))
    routed = gguf_experts(keys, router=gguf_sigmoid_router(keys), activation=activation)
    if routed.shared is not None:
        routed = replace(routed, shared=replace(routed.shared, activation=activation))
    dense = [i < keys.size("leading_dense_block_count", default=0, least=0) for i in range(count)]
    mlp = GatedMlp(keys.size("feed_forward_length"), activation) if any(dense) else None
    residual = Residual(
        "hyper",
        keys.size("hyper_connection.count"),
        "mean",
        rounds=keys.size("hyper_connection.sinkhorn_iterations"),
        eps=keys.number("hyper_connection.epsilon"),
    )
    layers = layers_of(_gguf_mixers(keys, count), dense, mlp, routed)
    return replace(gguf_model(keys, NAME, layers), residual=residual)


def _gguf_limit(keys: Keys, count: int) -> float:
    """The limit of gates and ups, which files have for experts and shared ones of each layer; it is that of
    dense layers too. Raises UnsupportedModelError if these differ."""
    name = "swiglu_clamp_exp"
    if not keys.has(name):
        return 0.0
    limit: float = keys.by_layer(name, count, float)[-1]
    for one in (name, "swiglu_clamp_shexp"):
        if keys.has(one):
            keys.expect_layers(one, count, limit)
    return limit


def _gguf_mixers(keys: Keys, count: int) -> list[Mixer]:
    dim = keys.size("kda.head_dim")
    bound = "kda.gate_lower_bound"
    delta = ChannelDelta(
        keys.size("attention.head_count"),
        dim,
        keys.size("ssm.conv_kernel"),
        dim,
        dim,
        keys.number(bound) if keys.has(bound) else None,
    )
    nope = keys.size("attention.key_length_mla")
    attention = LatentAttention(
        heads=keys.size("attention.head_count"),
        q_rank=keys.size("attention.q_lora_rank"),
        kv_rank=keys.size("attention.kv_lora_rank"),
        nope_dim=nope,
        rope_dim=0,
        value_dim=keys.size("attention.value_length_mla"),
        rope=None,
        scale=nope**-0.5,
        latent_eps=keys.number("attention.layer_norm_rms_epsilon"),
    )
    index = Selection(
        "pools",
        heads=keys.size("attention.indexer.head_count"),
        dim=keys.size("attention.indexer.key_length"),
        budget=keys.size("attention.indexer.top_k"),
        block=keys.size("attention.indexer.kpool"),
    )
    own = [True] * count
    if keys.has("attention.indexer.types"):
        own = keys.by_layer("attention.indexer.types", count, bool)
    kv_heads = keys.by_layer("attention.head_count_kv", count, int)
    return [
        replace(attention, selection=replace(index, reuses=not has_own)) if heads else delta
        for heads, has_own in zip(kv_heads, own, strict=True)
    ]


def streams_names(part: Literal["attn", "ffn"]) -> dict[str, Source]:
    """The weights that mix streams around a layer's mixer or its MLP, as DeepSeek-V4 names them too."""
    ours = {"attn": "attention", "ffn": "mlp"}[part]
    return {
        f"{ours}.residual.{one}": Source(
            (f"model.layers.{{i}}.hc_{part}_{one}",), (f"blk.{{i}}.hc_{part}_{one}.weight",)
        )
        for one in ("fn", "base", "scale")
    }


def _names() -> Mapping[str, Source]:
    names = dict(latent_decoder_names()) | channel_delta_names("model.layers.{i}.")
    names |= streams_names("attn") | streams_names("ffn")
    for ours, theirs in (("gate", "gate"), ("position", "ape")):
        names[f"index.pool_{ours}"] = Source(
            (f"model.layers.{{i}}.self_attn.indexer.index_kpool_compress_{theirs}",),
            (f"blk.{{i}}.indexer_compressor_{theirs}.weight",),
        )
    return {ours: replace(source, hf=_with_towers(source.hf)) for ours, source in names.items()}


def _with_towers(names: tuple[str, ...]) -> tuple[str, ...]:
    """The hub's names beside a vision tower, and those of a language model alone."""
    root, own = "model.", "model.language_model."
    return (*(name.replace(root, own, 1) for name in names if name.startswith(root)), *names)


FAMILY = Family(
    name=NAME,
    model_types=(NAME, "glm5_next_text"),
    architectures=("Glm5NextForConditionalGeneration", "Glm5NextForCausalLM"),
    reference="Glm5NextForConditionalGeneration",
    spec_from_hf=spec_from_hf,
    gguf="glm5-next",
    gguf_aliases=("glm5next",),
    spec_from_gguf=spec_from_gguf,
    names=_names(),
    left_out={"model.visual.": VISION},
    nested=(NAME,),
)
