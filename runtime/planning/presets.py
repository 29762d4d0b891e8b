"""Published shapes, so that a plan needs no model on disk (``krasis-info --plan --shape NAME``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from krasis.formats.errors import UsageError
from krasis.formats.models.spec import ModelSpec


def _config(
    model_type: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    positions: int,
    **others: Any,
) -> Mapping[str, Any]:
    """What a model's ``config.json`` says, by the names that all families share; others: by their own."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
        **others,
    }


def _qwen3_moe(layers: int, hidden: int, heads: int, intermediate: int) -> Mapping[str, Any]:
    return _config(
        "qwen3_moe",
        layers,
        hidden,
        heads,
        4,
        151936,
        40960,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=intermediate,
        norm_topk_prob=True,
    )


def _qwen2_moe(
    layers: int, hidden: int, heads: int, kv_heads: int, positions: int, **widths: int
) -> Mapping[str, Any]:
    return _config(
        "qwen2_moe", layers, hidden, heads, kv_heads, 151936, positions, norm_topk_prob=False, **widths
    )


def _mixtral(
    layers: int, hidden: int, heads: int, vocab: int, positions: int, width: int
) -> Mapping[str, Any]:
    return _config(
        "mixtral",
        layers,
        hidden,
        heads,
        8,
        vocab,
        positions,
        num_local_experts=8,
        num_experts_per_tok=2,
        intermediate_size=width,
    )


def _glm4_moe(layers: int, hidden: int, positions: int, **others: Any) -> Mapping[str, Any]:
    return _config(
        "glm4_moe",
        layers,
        hidden,
        96,
        8,
        151552,
        positions,
        head_dim=128,
        attention_bias=True,
        partial_rotary_factor=0.5,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        num_nextn_predict_layers=1,
        **others,
    )


def _latent(
    model_type: str, layers: int, hidden: int, heads: int, vocab: int, positions: int, **others: Any
) -> Mapping[str, Any]:
    """Of latent attention with DeepSeek-V3's sizes of a head, unless others says otherwise."""
    usual = {
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    return _config(model_type, layers, hidden, heads, heads, vocab, positions, **usual | others)


def _yarn(factor: float, mscale: float) -> Mapping[str, Any]:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


def _delta(
    layers: int, hidden: int, heads: int, experts: tuple[int, int, int], value_heads: int, **others: Any
) -> Mapping[str, Any]:
    """Gated DeltaNet. experts: how many, of these a token's, and their width, as the shared one's."""
    count, top, width = experts
    fields = {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "head_dim": 256,
        "num_experts": count,
        "num_experts_per_tok": top,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }
    return fields | others


def _gpt_oss(layers: int, num_experts: int) -> Mapping[str, Any]:
    return _config(
        "gpt_oss",
        layers,
        2880,
        64,
        8,
        201088,
        131072,
        head_dim=64,
        num_local_experts=num_experts,
        num_experts_per_tok=4,
        intermediate_size=2880,
        sliding_window=128,
        rope_theta=150_000,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    )


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 64, 1536),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 32, 768),
    "qwen3-next-80b-a3b": _delta(
        48, 2048, 16, (512, 10, 512), 32, model_type="qwen3_next", vocab_size=151936
    ),
    "qwen3.5-35b-a3b": _delta(40, 2048, 16, (256, 8, 512), 32),
    "qwen3.5-122b-a10b": _delta(48, 3072, 32, (256, 8, 1024), 64),
    "qwen3.5-397b-a17b": _delta(60, 4096, 32, (512, 10, 1024), 64),
    "qwen2-57b-a14b": _qwen2_moe(
        28,
        3584,
        28,
        4,
        32768,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=2560,
        shared_expert_intermediate_size=20480,
    ),
    "qwen1.5-moe-a2.7b": _qwen2_moe(
        24,
        2048,
        16,
        16,
        8192,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    "mixtral-8x7b": _mixtral(32, 4096, 32, 32000, 32768, 14336),
    "mixtral-8x22b": _mixtral(56, 6144, 48, 32768, 65536, 16384),
    "olmoe-1b-7b": _config(
        "olmoe",
        16,
        2048,
        16,
        16,
        50304,
        4096,
        num_experts=64,
        num_experts_per_tok=8,
        intermediate_size=1024,
        norm_topk_prob=False,
        rope_theta=1e4,
    ),
    "glm-4.5-air": _glm4_moe(
        46,
        4096,
        131072,
        n_routed_experts=128,
        moe_intermediate_size=1408,
        intermediate_size=10944,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        use_qk_norm=False,
    ),
    "glm-4.6": _glm4_moe(
        92,
        5120,
        202752,
        n_routed_experts=160,
        moe_intermediate_size=1536,
        intermediate_size=12288,
        first_k_dense_replace=3,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
    ),
    "deepseek-v3": _latent(
        "deepseek_v3",
        61,
        7168,
        128,
        129280,
        131072,
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        intermediate_size=18432,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        rope_theta=1e4,
        rope_scaling=_yarn(40, 1.0),
    ),
    "kimi-k2.5": _latent(
        "kimi_k2",
        61,
        7168,
        64,
        163840,
        131072,
        n_routed_experts=384,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        intermediate_size=18432,
        first_k_dense_replace=1,
        routed_scaling_factor=2.827,
        rms_norm_eps=1e-5,
        rope_theta=5e4,
        rope_scaling=_yarn(64, 1.0),
    ),
    "deepseek-v2-lite": _latent(
        "deepseek_v2",
        27,
        2048,
        16,
        102400,
        131072,
        q_lora_rank=None,
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        intermediate_size=10944,
        first_k_dense_replace=1,
        n_shared_experts=2,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        rope_theta=1e4,
        rope_scaling=_yarn(40, 0.707),
    ),
    "glm-4.7-flash": _latent(
        "glm4_moe_lite",
        47,
        2048,
        20,
        154880,
        131072,
        q_lora_rank=768,
        qk_nope_head_dim=192,
        v_head_dim=256,
        n_routed_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=1536,
        intermediate_size=10240,
        first_k_dense_replace=1,
        routed_scaling_factor=1.8,
        rms_norm_eps=1e-5,
    ),
    "glm-5.3-flash": _latent(
        "glm5_next_text",
        45,
        4096,
        64,
        154880,
        131072,
        qk_nope_head_dim=256,
        qk_rope_head_dim=0,
        v_head_dim=256,
        index_kpool=4,
        n_routed_experts=288,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        intermediate_size=12288,
        routed_scaling_factor=2.5,
    ),
    "nemotron-3-nano-30b": {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "num_hidden_layers": 52,
        "hidden_size": 2688,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 131072,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "intermediate_size": 1856,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "routed_scaling_factor": 2.5,
        "mlp_hidden_act": "relu2",
    },
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}
"""By name, what decides the shape in each model's ``config.json``."""


def shape(name: str) -> ModelSpec:
    """The model called ``name``. Raises UsageError that lists the known ones."""
    from krasis.formats.models.registry import spec_from_hf

    config = SHAPES.get(name.lower())
    if config is None:
        raise UsageError("unknown shape", where="--shape", got=repr(name), limit=", ".join(SHAPES))
    return spec_from_hf(config, name)
