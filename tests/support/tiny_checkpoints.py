"""Tiny random checkpoints of model families, made by transformers' own classes as the hub has them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from krasis.formats.models.registry import all_families

VOCAB = 320  # a byte-level alphabet, special tokens, and some that nothing stands for
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>")
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
}
MLA: dict[str, Any] = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
INDEX: dict[str, Any] = {
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 80,
    "num_nextn_predict_layers": 0,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# What a family's config has beside BASE; None leaves a field out.
FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 64, "moe_intermediate_size": None},
    "olmoe": {
        "num_experts": 8,
        "intermediate_size": 64,
        "moe_intermediate_size": None,
        "head_dim": None,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-5,
    },
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 128, "qkv_bias": True},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "intermediate_size": 256,
        "tie_word_embeddings": False,
    },
    "hy_v3": {"num_experts": 8, "num_shared_experts": 1},
    "hunyuan_v1_moe": {
        "num_experts": 8,
        "num_local_experts": 8,
        "moe_topk": [2, 2, 2],
        "moe_intermediate_size": [128, 128, 128],  # the reference reads the other one
        "num_shared_expert": [1, 1, 1],
        "use_qk_norm": True,
        "use_mixed_mlp_moe": True,
        "use_cla": False,
    },
    "minimax_m2": {
        "num_local_experts": 8,
        "intermediate_size": 64,
        "moe_intermediate_size": None,
        "rotary_dim": 16,
        # The same again: transformers before 5.2x reads this alone.
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    },
    "granitemoe": {
        "num_local_experts": 8,
        "intermediate_size": 64,
        "moe_intermediate_size": None,
        "head_dim": None,
        # Small, so that the eps of norms counts.
        "embedding_multiplier": 0.5,
        "residual_multiplier": 0.4,
        "rms_norm_eps": 0.1,
        "logits_scaling": 6.0,
        "attention_multiplier": 0.05,
    },
    "deepseek_v2": {
        **MLA,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        **MLA,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 0,
        "scoring_func": "sigmoid",  # as the hub has it; transformers writes none
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "gemma4": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "num_experts_per_tok": None,
        "attention_k_eq_v": True,
        "head_dim": 32,
        "global_head_dim": 512,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 16,
        "final_logit_softcapping": 15.0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "deepseek_v32": {**MLA, **INDEX},
    "glm_moe_dsa": {**MLA, **INDEX, "indexer_types": ["full", "shared", "full"]},
    "glm4_moe_lite": {**MLA, "v_head_dim": 96, "rms_norm_eps": 1e-5},
    "mistral4": {
        **MLA,
        "qk_rope_head_dim": 64,
        "first_k_dense_replace": 0,
        "rope_parameters": YARN
        | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5},
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "hidden_size": 192,  # no power of two, and no matrix is square
        "intermediate_size": 64,
        "moe_intermediate_size": None,
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "tie_word_embeddings": False,
    },
    "kimi_linear": {
        **MLA,
        "q_lora_rank": None,
        "n_routed_experts": None,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "linear_num_heads": 4,
        "linear_head_dim": 64,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "lfm2_moe": {
        "num_experts": 8,
        "head_dim": None,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
        "norm_eps": 1e-4,
        "routed_scaling_factor": 1.5,
    },
    # The fields of the language model, beside which the config has those of TOWERS.
    "qwen3_vl_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 192,  # no matrix is square: transformers would not turn those
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        },
    },
}
DELTA: dict[str, Any] = {
    "num_experts": 8,
    "num_hidden_layers": 4,  # three of Gated DeltaNet, one of attention
    "shared_expert_intermediate_size": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
}
FIELDS["nemotron_h"] = {
    "layers_block_type": ["mamba", "moe", "attention", "mamba", "moe"],
    "num_hidden_layers": None,
    "n_routed_experts": 8,
    "moe_shared_expert_intermediate_size": 128,
    "mamba_num_heads": 10,
    "mamba_head_dim": 16,
    "ssm_state_size": 64,
    "n_groups": 2,
    "routed_scaling_factor": 2.5,
    "time_step_min": 0.6,  # as large as some steps are
}
FIELDS["glm5_next"] = {
    **MLA,
    **INDEX,
    "num_hidden_layers": 5,
    "qk_rope_head_dim": 0,
    "index_n_heads": 16,  # many, so that few scores are zeros, of which any may be chosen
    "index_kpool": 4,
    "index_topk": 24,  # less than tests compute: it has to choose
    "first_k_dense_replace": None,
    "mlp_layer_types": ["dense", *4 * ["sparse"]],
    "linear_num_heads": 4,
    "linear_head_dim": 64,
    "layer_types": ["linear_attention", *2 * ["indexed_attention"], "linear_attention", "indexed_attention"],
    "indexer_types": ["full", "full", "shared", "full", "full"],
    "routed_scaling_factor": 2.5,
    "swiglu_limit": 0.5,  # so that some products are beyond it
    "num_nextn_predict_layers": None,
}
FIELDS["deepseek_v4"] = {
    "num_hidden_layers": 5,
    "head_dim": 64,
    "num_key_value_heads": 1,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_hash_layers": 2,
    "index_n_heads": 16,  # many, so that few scores are zeros, of which any may be chosen
    "index_head_dim": 32,
    "index_topk": 5,  # fewer entries than tests compute: it has to choose
    "sliding_window": 16,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ],
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "swiglu_limit": 0.5,  # so that some products are beyond it
    "num_nextn_predict_layers": None,
}
FIELDS_ABOUT_0 = ("qwen3_next", "qwen3_5_moe", "qwen4_exp")  # whose norms have weights about 0
FIELDS |= {"qwen3_next": DELTA, "qwen3_5_moe": DELTA}
FIELDS["qwen4_exp"] = DELTA | {
    "hc_count": 4,
    "hc_lowrank": 64,
    "ple_layer_ids": [1, 3],
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 500,
    "split_ngram_parts": 3,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 80,
    "indexer_compress_ratio": 4,
    "output_gate_type": "sigmoid",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
TOWERS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 128,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
            "patch_size": 4,
        },
        "tie_word_embeddings": False,
    },
    "glm5_next": {
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "projection_intermediate_size": 32,
            "patch_size": 4,
        },
        "tie_word_embeddings": False,
    },
}


ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.proj.weight", "router.layer.weight")


def tiny(family: str, folder: Path, *, seed: int = 0, dtype: str = "bfloat16", **changes: Any) -> Path:
    """A checkpoint of a family, with a byte-level tokenizer. changes: fields of its config; None leaves one
    out. Every weight is random, biases and norms too.
    """
    import torch

    model = reference_model(family, seed=seed, **changes).to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    own = next(one for one in all_families() if one.name == family)
    if model.config_class.model_type not in own.model_types:  # the reference is another family's
        path = folder / "config.json"
        config = json.loads(path.read_text("utf-8"))
        config |= {"model_type": own.model_types[0], "architectures": [own.architectures[0]]}
        path.write_text(json.dumps(config), "utf-8")
    if family == "qwen3_vl_moe":
        turn_experts(folder)
    write_tokenizer(folder)
    return folder


def turn_experts(folder: Path) -> None:
    """Each matrix of an expert the other way round, as the hub has those of some families."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {
        name: one.transpose(1, 2).contiguous() if ".experts." in name else one
        for name, one in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})


def reference_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """The same in memory, in float32."""
    import torch
    import transformers

    reference = next(one.reference for one in all_families() if one.name == family)
    fields = BASE | FIELDS.get(family, {}) | changes
    config_class = getattr(transformers, reference).config_class
    # Only a null says that queries have no latent.
    fields = {name: value for name, value in fields.items() if value is not None or name == "q_lora_rank"}
    if family in TOWERS:
        fields = {"text_config": fields} | TOWERS[family]
    config = config_class(**fields)
    config.architectures = [reference]
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = getattr(transformers, reference)(config).float()
        for name, weight in model.state_dict().items():
            is_tied_head = name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False)
            if name.endswith("tid2eid"):  # different experts of each token
                scores = torch.rand(len(weight), fields["n_routed_experts"], generator=generator)
                weight.copy_(scores.argsort(dim=1)[:, : weight.shape[1]])
            if not weight.is_floating_point() or is_tied_head:
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if family == "gemma4" and name.endswith("q_norm.weight"):  # its attention has a scale of 1
                weight.copy_((1 + 0.1 * noise) * weight.shape[-1] ** -0.5)
            elif name.endswith("norm.weight") or ".norm_" in name:
                is_about_0 = family in FIELDS_ABOUT_0 and not name.endswith("linear_attn.norm.weight")
                weight.copy_((0 if is_about_0 else 1) + 0.1 * noise)
            elif name.endswith("A_log"):
                weight.copy_(
                    0.7 * noise - 1
                )  # decays of 0.4 to 0.95 a token: neither nothing nor all is kept
            elif name.endswith(("conv1d.weight", "conv.conv.weight")):
                weight.copy_(noise * weight.shape[-1] ** -0.5)
            elif name.endswith(("_hc.base", "compress_ape", "position_bias")):
                weight.copy_(noise)  # as large as what they are added to
            elif name.endswith("bias"):
                weight.copy_(0.1 * noise)
            elif name.endswith(("layer_scalar", "router.scale", "per_expert_scale", "_hc.scale")):
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith(("embed_tokens.weight", "embeddings.weight")):
                weight.copy_(noise)  # what the blocks add is small beside it, as in trained models
            elif name.endswith(
                (
                    "mlp.gate.weight",
                    "block_sparse_moe.gate.weight",
                    "router.proj.weight",
                    "router.layer.weight",
                    "mlp.router.weight",
                    "feed_forward.gate.weight",
                    "mixer.gate.weight",
                )
            ):
                # Decided, as trained routers are: near-ties would turn on the rounding of an activation.
                weight.copy_(2.25 * noise * weight.shape[-1] ** -0.5)
            else:
                weight.copy_(0.5 * noise * weight.shape[-1] ** -0.5)
                if family == "gpt_oss" and ".experts." in name:  # so that some products are beyond the clamp
                    weight.mul_(6 if name.endswith("gate_up_proj") else 0.1)
    return model.eval()


def write_tokenizer(folder: Path) -> None:
    """Tokens of single bytes, then the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
