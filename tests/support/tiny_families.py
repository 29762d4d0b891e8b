"""Tiny models of every family that runs: the config as transformers reads it, and random packed weights."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def _rope(theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def _yarn(**more: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0,
            "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0, **more,
        }
    }  # fmt: skip


_MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "intermediate_size": 192, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_COMMON, **_rope(),
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "mixtral": {
        **_COMMON, **_rope(1e6),
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
        "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128,
        "sliding_window": None,
    },
    "olmoe": {
        **_COMMON, **_rope(),
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"],
        "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 64,
        "norm_topk_prob": False, "attention_bias": False, "clip_qkv": 3.0,
    },
    "glm4_moe": {
        **_COMMON, **_rope(partial_rotary_factor=0.5), "partial_rotary_factor": 0.5,
        "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "intermediate_size": 192, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 4, "topk_group": 2,
        "norm_topk_prob": True, "routed_scaling_factor": 1.5, "attention_bias": True, "use_qk_norm": True,
    },
    "qwen2_moe": {
        **_COMMON, **_rope(),
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 128,
        "shared_expert_intermediate_size": 96, "norm_topk_prob": False, "qkv_bias": True,
        "decoder_sparse_step": 2, "mlp_only_layers": [], "use_sliding_window": False,
    },
    "dots1": {
        **_COMMON, **_rope(),
        "model_type": "dots1", "architectures": ["Dots1ForCausalLM"],
        "head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
        "intermediate_size": 192, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 1.5, "attention_bias": False,
    },
    "ernie4_5_moe": {
        **_COMMON, **_rope(500_000.0),
        "model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"],
        "head_dim": 32, "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 64,
        "intermediate_size": 192, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        "moe_layer_end_index": 2, "moe_layer_interval": 1, "moe_norm_min": 0.5, "use_bias": False,
    },
    "hy_v3": {
        **_COMMON, **_rope(11_158_840.0),
        "model_type": "hy_v3", "architectures": ["HYV3ForCausalLM"],
        "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "intermediate_size": 192, "num_shared_experts": 1, "router_scaling_factor": 1.75,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "minimax_m2": {
        **_COMMON, **_rope(5e6, partial_rotary_factor=0.5),
        "model_type": "minimax_m2", "architectures": ["MiniMaxM2ForCausalLM"],
        "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
        "rotary_dim": 16, "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True,
    },
    "deepseek_v2": {
        **_COMMON, **_MLA,
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "norm_topk_prob": False, "routed_scaling_factor": 4.0, "scoring_func": "softmax",
        **_yarn(mscale=0.707, mscale_all_dim=0.707),
    },
    "deepseek_v3": {
        **_COMMON, **_MLA,
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", **_yarn(mscale=1.0, mscale_all_dim=0.5),
    },
    "glm4_moe_lite": {
        **_COMMON, **_MLA, **_rope(1e6),
        "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"],
        "v_head_dim": 96, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.8, "attention_bias": True,
    },
    "glm_moe_dsa": {
        **_COMMON, **_MLA, **_rope(1e6),
        "model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"],
        "index_n_heads": 4, "index_head_dim": 64, "index_topk": 128,
        "indexer_types": ["full", "shared", "full"],
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    "mistral4": {
        **_COMMON, **_MLA,
        "model_type": "mistral4", "architectures": ["Mistral4ForCausalLM"],
        "rope_parameters": {
            **_yarn(mscale=1.0, mscale_all_dim=1.0)["rope_parameters"],
            "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5,
        },
        "qk_rope_head_dim": 64,
        "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    },
    "qwen3_next": {
        **_COMMON, **_rope(1e6, partial_rotary_factor=0.25), "num_hidden_layers": 4,
        "model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"],
        "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
        "intermediate_size": 96, "shared_expert_intermediate_size": 64, "norm_topk_prob": True,
        "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 32,
        "linear_value_head_dim": 48, "linear_conv_kernel_dim": 4, "mlp_only_layers": [1],
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    },
    "qwen3_5_moe": {
        **_COMMON, **_rope(1e6, partial_rotary_factor=0.25),
        "model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"],
        "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 32, "linear_conv_kernel_dim": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
}  # fmt: skip
