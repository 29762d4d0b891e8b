"""Qwen3-MoE: grouped-query attention with norms of q and k by head, experts in every layer."""

from __future__ import annotations

from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys
from krasis.formats.models.gguf_blocks import gguf_attention, gguf_experts, gguf_model, refuse_gguf_features
from krasis.formats.models.hf import Config
from krasis.formats.models.hf_blocks import attention, experts, model, moe_layers, softmax_router
from krasis.formats.models.long_context import dual_chunk_context
from krasis.formats.models.names import decoder_names
from krasis.formats.models.spec import Layer, ModelSpec

NAME = "qwen3_moe"


def spec_from_hf(config: Config) -> ModelSpec:
    """The model of a ``config.json``."""
    refuse_features(config)
    mixer = attention(config, qk_norm="head")
    layers = moe_layers(config, mixer, experts(config, softmax_router(config)))
    longest = config.size("max_position_embeddings")
    kind = "none" if mixer.rope is None else mixer.rope.scaling.kind
    longest = min(longest, dual_chunk_context(config.table, kind, config.where) or longest)
    return model(config, NAME, layers, max_positions=longest)


def refuse_features(config: Config) -> None:
    """UnsupportedModelError for every setting that would make the model compute something else."""
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False, limit="no biases")
    config.expect("use_sliding_window", False, limit="full attention")
    config.expect("mlp_only_layers", [], limit="experts in every layer")
    config.expect("decoder_sparse_step", 1, limit="experts in every layer")
    config.expect("partial_rotary_factor", 1, 1.0)
    kinds = config.table.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        raise config.unsupported("layer_types", kinds, "full_attention")


def spec_from_gguf(keys: Keys) -> ModelSpec:
    """The model of a GGUF's metadata."""
    refuse_gguf_features(keys, "expert_weights_scale", "leading_dense_block_count", "expert_shared_count")
    mixer = gguf_attention(keys, qk_norm="head")
    # Every program that runs qwen3moe GGUFs renormalises; the key is newer than most files.
    routed = gguf_experts(keys, renormalise=keys.flag("expert_weights_norm", default=True))
    return gguf_model(keys, NAME, [Layer(mixer, routed)] * keys.size("block_count"))


FAMILY = Family(
    name=NAME,
    model_types=(NAME,),
    architectures=("Qwen3MoeForCausalLM",),
    reference="Qwen3MoeForCausalLM",
    spec_from_hf=spec_from_hf,
    gguf="qwen3moe",
    spec_from_gguf=spec_from_gguf,
    names=decoder_names(),
)
