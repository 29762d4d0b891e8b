"""Reads latent attention (MLA), and what goes with it, out of GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from krasis.formats.errors import FormatError
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import (
    SIGMOID,
    SOFTMAX,
    gguf_experts,
    gguf_layers,
    gguf_layers_of,
    gguf_model,
    refuse_gguf_features,
)
from krasis.formats.models.hf_blocks import R3_EPSILON
from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.mlps import Router
from krasis.formats.models.rope import QueryTemperature, Rope
from krasis.formats.models.selection import Selection
from krasis.formats.models.spec import ModelSpec

_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
_GLM_VOCAB = 154_880
_CORRECTION = "exp_probs_b.bias"


def deepseek2_from_gguf(keys: Keys) -> ModelSpec:
    """The model of metadata of ``deepseek2``, llama.cpp's one architecture for DeepSeek-V2, V3, Kimi-K2 and
    GLM-4.7-Flash: a softmax is V2's, and GLM is known by its vocabulary.
    """
    spec = gguf_latent_model(keys, "deepseek_v3", gguf_latent_router(keys, by_best_two=False))
    if not is_sigmoid(keys):
        return replace(spec, family="deepseek_v2")
    return replace(spec, family="glm4_moe_lite") if spec.vocab == _GLM_VOCAB else spec


def gguf_latent_model(keys: Keys, family: str, router: Router) -> ModelSpec:
    """The model: latent attention in every layer, dense layers first, experts with shared ones."""
    refuse_gguf_features(keys)
    layers = gguf_layers(keys, gguf_latent(keys), gguf_experts(keys, router=router))
    return gguf_model(keys, family, layers)


def gguf_latent(keys: Keys) -> LatentAttention:
    """Latent attention. Files with keys and values of latents together have the sizes of a head's keys and
    values under the usual names; the others there those of one latent.
    """
    apart = keys.has("attention.key_length_mla")
    ending = "_mla" if apart else ""
    key_width, value_dim = (keys.size(f"attention.{part}_length{ending}") for part in ("key", "value"))
    rope_dim = keys.size("rope.dimension_count")
    if rope_dim >= key_width:
        where = keys.path("rope.dimension_count")
        raise FormatError(
            "more channels are rotated than there are", where=where, got=rope_dim, limit=key_width
        )
    rope, factor = _rope(keys, rope_dim)
    beta = keys.number("attention.temperature_scale", default=0.0)
    temperature = QueryTemperature(beta, keys.size("attention.temperature_length")) if beta else None
    return LatentAttention(
        heads=keys.size("attention.head_count"),
        q_rank=keys.size("attention.q_lora_rank") if keys.has("attention.q_lora_rank") else None,
        kv_rank=keys.size("attention.kv_lora_rank"),
        nope_dim=key_width - rope_dim,
        rope_dim=rope_dim,
        value_dim=value_dim,
        rope=rope,
        scale=key_width**-0.5 * factor**2,
        temperature=temperature,
    )


def gguf_indexed_model(
    keys: Keys, family: str, style: Literal["half", "interleaved"], is_full: Sequence[bool] | None = None
) -> ModelSpec:
    """The same with an index over tokens. style: of its rotation. is_full: the layers that have one of their
    own, None for all; the others take the choice of the one before."""
    refuse_gguf_features(keys)
    own = gguf_latent(keys)
    count = keys.size("block_count") - keys.size("nextn_predict_layers", default=0, least=0)
    full = [True] * count if is_full is None else is_full
    if own.q_rank is None:
        raise FormatError("an index needs the query's latent", where=keys.path("attention.q_lora_rank"))
    index = Selection(
        "tokens",
        heads=keys.size("attention.indexer.head_count"),
        dim=keys.size("attention.indexer.key_length"),
        budget=keys.size("attention.indexer.top_k"),
        rope=None if own.rope is None else replace(own.rope, style=style),
    )
    mixers = [replace(own, selection=replace(index, reuses=not has_own)) for has_own in full[:count]]
    routed = gguf_experts(keys, router=gguf_latent_router(keys, by_best_two=False))
    return gguf_model(keys, family, gguf_layers_of(keys, mixers, routed))


def _rope(keys: Keys, dims: int) -> tuple[Rope, float]:
    """The rotation, and what the scale of attention is multiplied by twice. llama.cpp keeps a tenth of
    mscale_all_dim and takes mscale to be the same, so that sine and cosine are not scaled.
    """
    rope = keys.rope(dims, "interleaved")
    scaling = rope.scaling
    if scaling.kind != "yarn":
        return rope, 1.0
    scaling = replace(
        scaling,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", default=1.0),
    )
    if not keys.has(_LOG_MULTIPLIER):
        return replace(rope, scaling=scaling), 1.0
    factor = keys.number(_LOG_MULTIPLIER) * math.log(scaling.factor) + 1.0
    return replace(rope, scaling=replace(scaling, attention_factor=1.0)), factor


def is_sigmoid(keys: Keys) -> bool:
    """Whether a router scores by sigmoids: files that do not say so have correction biases."""
    keys.expect("expert_gating_func", SOFTMAX, SIGMOID, 0)
    kind = keys.size("expert_gating_func", default=0, least=0)
    return kind == SIGMOID or (kind == 0 and any(name.endswith(_CORRECTION) for name in keys.tensors))


def gguf_latent_router(keys: Keys, *, by_best_two: bool) -> Router:
    """A router by sigmoids with a correction bias, or by a softmax. by_best_two: how a softmax's groups are
    scored. llama.cpp leaves the flag out where weights are not divided by their sum.
    """
    sigmoid = is_sigmoid(keys)
    return Router(
        keys.size("expert_used_count"),
        "sigmoid" if sigmoid else "softmax",
        renormalise=keys.flag("expert_weights_norm", default=False),
        scale=keys.number("expert_weights_scale", default=1.0) or 1.0,
        correction_bias=sigmoid,
        groups=keys.size("expert_group_count", default=1, least=0) or 1,
        top_groups=keys.size("expert_group_used_count", default=1, least=0) or 1,
        group_score="best_two" if sigmoid or by_best_two else "best",
        sum_epsilon=R3_EPSILON if sigmoid else 0.0,
    )
