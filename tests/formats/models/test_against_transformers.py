"""Every family counts the weights of transformers' own class, from the config that it writes."""

import importlib
import warnings

import pytest

from krasis.formats.models.registry import all_families, family_of_model_type, spec_from_hf
from krasis.formats.models.tensors import count_parameters

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402

BASE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
}
E8 = {"num_experts": 8}
ROUTED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MLA = {
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
    "head_dim": ...,
}
INDEX = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 16}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "shared_expert_intermediate_size": 48,
}
# family -> (name of the config's class, its fields beside BASE; ... leaves one out)
CASES = {
    "qwen3_moe": ("Qwen3MoeConfig", E8),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8}),
    "olmoe": ("OlmoeConfig", E8 | {"clip_qkv": 3.0, "head_dim": ...}),
    "glm4_moe": ("Glm4MoeConfig", ROUTED | {"use_qk_norm": True, "attention_bias": True}),
    "qwen2_moe": ("Qwen2MoeConfig", E8 | {"shared_expert_intermediate_size": 48, "mlp_only_layers": [1]}),
    "qwen3_vl_moe": ("Qwen3VLMoeTextConfig", {"num_local_experts": 8}),
    "qwen3_next": ("Qwen3NextConfig", E8 | DELTA | {"mlp_only_layers": [2]}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", E8 | DELTA),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        E8
        | DELTA
        | {
            "hc_lowrank": 16,
            "ple_layer_ids": [2],
            "ple_embed_dim": 64,
            "ngram_vocab_size_base": 101,
            "heads_per_ngram": 2,
            "make_ngram_vocab_size_divisible_by": 4,
            "split_ngram_parts": 1,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
    ),
    "minimax_m2": ("MiniMaxM2Config", {"num_local_experts": 8, "rotary_dim": 16}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 8, "logits_scaling": 4.0, "head_dim": ...}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {"moe_num_experts": 8, "moe_k": 2}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", E8 | {"moe_topk": 2, "moe_intermediate_size": ...}),
    "dots1": ("Dots1Config", ROUTED),
    "hy_v3": ("HYV3Config", E8),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 8, "sliding_window": 16}),
    "gemma4": (
        "Gemma4TextConfig",
        E8
        | {
            "top_k_experts": 2,
            "enable_moe_block": True,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 16,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    "deepseek_v2": ("DeepseekV2Config", MLA | ROUTED | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3Config", MLA | ROUTED),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", MLA | ROUTED),
    "mistral4": ("Mistral4Config", MLA | ROUTED),
    "deepseek_v32": ("DeepseekV32Config", MLA | ROUTED | INDEX),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        MLA | ROUTED | INDEX | {"indexer_types": ["full", "full", "shared", "full"]},
    ),
    "glm5_next": (
        "Glm5NextTextConfig",
        MLA
        | ROUTED
        | INDEX
        | {"qk_rope_head_dim": 0, "linear_head_dim": 32, "linear_num_heads": 4, "index_kpool": 4}
        | {"mlp_layer_types": ["dense"] + ["sparse"] * 3},
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        MLA
        | ROUTED
        | {"num_local_experts": 8, "linear_head_dim": 16, "linear_num_heads": 4, "num_hidden_layers": 6},
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        MLA | ROUTED | {"num_local_experts": 8, "head_dim": 32, "num_hidden_layers": 6, "q_lora_rank": None},
    ),
    "deepseek_v4": (
        "DeepseekV4Config",
        INDEX
        | {
            "num_key_value_heads": 1,
            "head_dim": 64,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "o_groups": 2,
            "o_lora_rank": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_hash_layers": 1,
            "sliding_window": 16,
            "compress_ratios": [0, 4, 128, 4],
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        ROUTED
        | {
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 2,
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
    "step3p7": (
        "Step3p7TextConfig",
        {
            "n_routed_experts": 8,
            "share_expert_dim": 48,
            "sliding_window": 16,
            "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
            "num_sliding_attention_heads": 8,
        },
    ),
    "laguna": (
        "LagunaConfig",
        E8
        | {
            "shared_expert_intermediate_size": 48,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "num_attention_heads_per_layer": [4, 8, 4, 8],
        },
    ),
    "mimo_v2_flash": ("MiMoV2FlashConfig", {"n_routed_experts": 8, "v_head_dim": 16, "sliding_window": 16}),
    "minimax_m3": (
        "MiniMaxM3VLTextConfig",
        {
            "num_local_experts": 8,
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 48,
            "rotary_dim": 16,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 3,
            "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        },
    ),
    "cohere2_moe": (
        "Cohere2MoeConfig",
        E8 | {"num_shared_experts": 1, "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 96},
    ),
    "lfm2_moe": ("Lfm2MoeConfig", E8 | {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 8, "intermediate_size_mlp": 160, "interleave_moe_layer_step": 2},
    ),
}
# Numbers that are weights but no parameters to transformers.
BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar")


def case_of(family):
    """The row of CASES; of a family with another one's reference class, that one's."""
    if family.name in CASES:
        return CASES[family.name]
    model_type = getattr(transformers, family.reference).config_class.model_type
    return CASES[family_of_model_type(model_type).name]


def config_of(family):
    """A small config as transformers writes it."""
    name, fields = case_of(family)
    module = getattr(transformers, family.reference).__module__.replace(".modeling_", ".configuration_")
    values = {key: value for key, value in (BASE | fields).items() if value is not ...}
    if "layers_block_type" in values:
        del values["num_hidden_layers"]
    return getattr(importlib.import_module(module), name)(**values)


def reference_class(family):
    """The family's language model with a head; of some there is only the one without."""
    reference = getattr(transformers, family.reference)
    if family.reference.endswith("ForConditionalGeneration"):
        module = importlib.import_module(reference.__module__)
        return next(getattr(module, name) for name in dir(module) if name.endswith("TextModel"))
    return reference


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_counts_the_weights_of_the_reference(family):
    config = config_of(family)
    record = config.to_dict()
    record.setdefault("model_type", config.model_type)
    if family.name not in CASES:
        record["model_type"] = family.model_types[0]
    spec = spec_from_hf(record | {"architectures": None}, "config.json")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = reference_class(family)(config)
    expected = sum(parameter.numel() for parameter in model.parameters())
    expected += sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(BUFFERS))
    headless = getattr(model, "lm_head", None) is None
    head = spec.vocab * spec.hidden if headless and not spec.tied else 0
    assert count_parameters(spec).total == expected + head
    assert type(spec).from_json(spec.to_json()) == spec
