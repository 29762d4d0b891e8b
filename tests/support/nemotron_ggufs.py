"""Nemotron-H as a GGUF, as llama.cpp's converter writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_EXPERT = re.compile(r"backbone\.(layers\.\d+)\.mixer\.experts\.(\d+)\.(\w+)\.weight")


def nemotron_gguf(
    config: Mapping[str, Any], tensors: Mapping[str, Floats], path: Path, experts: str, dense: str
) -> Path:
    """experts, dense: types of the matrices; vectors, routers and convolutions are F32."""
    architecture = gguf.MODEL_ARCH.NEMOTRON_H_MOE
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_metadata(writer, config)
    names = gguf.get_tensor_name_map(architecture, len(config["layers_block_type"]))
    for name, values in _as_there(config, tensors).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"the gguf package has no name for {name}")
        is_float = values.ndim == 1 or any(part in theirs for part in ("ffn_gate_inp", "ssm_conv1d"))
        is_float = is_float or theirs.endswith(("ssm_a", "ssm_d", "ssm_norm.weight"))
        kind = gguf.GGMLQuantizationType["F32" if is_float else experts if "_exps" in theirs else dense]
        writer.add_tensor(theirs, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_there(config: Mapping[str, Any], tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    out: dict[str, Floats] = {}
    stacked: dict[str, dict[int, Floats]] = {}
    for name, values in tensors.items():
        if (found := _EXPERT.fullmatch(name)) is not None:
            layer, number, part = found.groups()
            stacked.setdefault(f"model.{layer}.mlp.experts.{part}.weight", {})[int(number)] = values
        elif name.endswith("mixer.A_log"):
            out[name] = -np.exp(values)[:, None]
        elif name.endswith("mixer.D"):
            out[name] = values[:, None]
        elif name.endswith("mixer.norm.weight"):
            out[name] = values.reshape(config["n_groups"], -1)
        elif name.endswith("conv1d.weight"):
            out[name] = values[:, 0]
        elif name.endswith("dt_bias"):
            out[name.replace("dt_bias", "dt.bias")] = values
        else:
            out[name.replace("e_score_correction_bias", "e_score_correction.bias")] = values
    return out | {
        name: np.stack([by_number[number] for number in sorted(by_number)])
        for name, by_number in stacked.items()
    }


def _add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    kinds = config["layers_block_type"]
    heads = {"full_attention": config["num_key_value_heads"]}
    widths = {"moe": config["moe_intermediate_size"]}
    writer.add_block_count(len(kinds))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([heads.get(kind, 0) for kind in kinds])
    writer.add_feed_forward_length([widths.get(kind, 0) for kind in kinds])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_state_size(config["ssm_state_size"])
    writer.add_ssm_group_count(config["n_groups"])
    writer.add_ssm_inner_size(config["mamba_num_heads"] * config["mamba_head_dim"])
    writer.add_ssm_time_step_rank(config["mamba_num_heads"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_group_count(config["n_group"])
    if config["moe_latent_size"] is not None:
        writer.add_moe_latent_size(config["moe_latent_size"])
