"""Tiny checkpoints as GGUFs, written by the gguf package as llama.cpp's converter writes them, or by that
converter itself where it is at hand.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tests.support import glm5_ggufs, kimi_ggufs
from tests.support.gemma4_ggufs import gemma4_gguf
from tests.support.nemotron_ggufs import nemotron_gguf

Floats = npt.NDArray[np.float32]

ARCHITECTURES = {
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "dots1": gguf.MODEL_ARCH.DOTS1,
    "ernie4_5_moe": gguf.MODEL_ARCH.ERNIE4_5_MOE,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    "hunyuan_v1_moe": gguf.MODEL_ARCH.HUNYUAN_MOE,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE,
    "qwen3_vl_moe": gguf.MODEL_ARCH.QWEN3VLMOE,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), gguf.MODEL_ARCH.DEEPSEEK2),
    "mistral4": gguf.MODEL_ARCH.MISTRAL4,
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), gguf.MODEL_ARCH.GLM_DSA),
    "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_moe": gguf.MODEL_ARCH.QWEN35MOE,
    "qwen3_5_moe_text": gguf.MODEL_ARCH.QWEN35MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "lfm2_moe": gguf.MODEL_ARCH.LFM2MOE,
    "kimi_linear": gguf.MODEL_ARCH.KIMI_LINEAR,
    "glm5_next": gguf.MODEL_ARCH.GLM_DSA,  # and others: see ``glm5_ggufs``
    "hy_v3": gguf.MODEL_ARCH.DOTS1,  # whose names it has; the package does not know it yet
}
FLOAT = (
    "ffn_gate_inp",
    "exp_probs_b",
    "ssm_conv1d",
    "shortconv.conv",
    "ssm_a",
    "hc_",
    "indexer_compressor",
)  # whatever the type of the others
CONVERTER = "KRASIS_LLAMA_CPP"
"""The environment variable with the folder of llama.cpp's sources (convert_hf_to_gguf.py in it)."""

_EXPERT = re.compile(r"(model\.layers\.\d+\..*\.experts)\.(\d+)\.(\w+)\.weight")
# llama.cpp maps these by the names of a stacked tensor.
_STACKED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def tiny_gguf(
    source: Path, path: Path, *, experts: str = "F32", dense: str = "F32", together: bool = False
) -> Path:
    """A GGUF of a checkpoint. experts, dense: types of the matrices; vectors and routers are F32. together:
    latent attention as old files have it.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    family = config["model_type"]
    config = config | config.get("text_config", {}) | {"model_type": family}
    if family == "gemma4_text":
        return gemma4_gguf(config, read_tensors(source), path, experts, dense)
    if family == "nemotron_h":
        return nemotron_gguf(config, read_tensors(source), path, experts, dense)
    if family == "kimi_linear":
        config = kimi_ggufs.usual_config(config)
    if family == "glm5_next":
        config = glm5_ggufs.usual_config(config)
    architecture = ARCHITECTURES[family]
    # The gguf package does not know these yet.
    newer = {"hy_v3": "hy_v3", "deepseek_v32": "deepseek32", "glm5_next": glm5_ggufs.NAME}
    writer = gguf.GGUFWriter(path, newer.get(family, gguf.MODEL_ARCH_NAMES[architecture]))
    num_blocks = config["num_hidden_layers"] + (config.get("num_nextn_predict_layers") or 0)
    if "kv_lora_rank" in config:
        config = config | {"head_dim": None, "num_key_value_heads": 1}
        _add_latent(writer, config, together)
    _add_metadata(writer, config, num_blocks)
    names = gguf.get_tensor_name_map(architecture, num_blocks)
    tensors = read_tensors(source)
    if "linear_num_key_heads" in config:
        tensors = _delta_tensors(tensors, config)
    if family == "kimi_linear":
        tensors = kimi_ggufs.delta_tensors(tensors)
    if family == "glm5_next":
        tensors = glm5_ggufs.language_tensors(tensors)
    tensors = _stacked(tensors, family)
    if "kv_lora_rank" in config and not together:
        tensors = _latents_apart(tensors, config)
    for name, values in tensors.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias")) or _nextn_name(name)
        theirs = theirs or glm5_ggufs.name_of(name, num_blocks)
        if theirs is None:
            raise ValueError(f"the gguf package has no name for {name}")
        is_vector = values.ndim == 1 or theirs.endswith(".bias")
        is_float = is_vector or any(part in theirs for part in FLOAT)
        kind = gguf.GGMLQuantizationType["F32" if is_float else experts if "_exps" in theirs else dense]
        if family in ("mixtral", "granitemoe") and re.search(r"attn_[qk]\.weight", theirs):
            heads = config["num_attention_heads" if "attn_q" in theirs else "num_key_value_heads"]
            raw = gguf.quants.quantize(permuted(values, heads), kind)
        else:
            raw = gguf.quants.quantize(values, kind)
        writer.add_tensor(theirs, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _nextn_name(name: str) -> str | None:
    """Of a drafting layer's own tensor, for architectures of which the gguf package does not know it yet."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm|shared_head\.norm)\.weight", name)
    return f"blk.{found[1]}.nextn.{found[2].replace('.', '_')}.weight" if found else None


def permuted(values: Floats, heads: int) -> Floats:
    """Rows of q or k as llama.cpp's Llama converter orders them: rotated pairs side by side."""
    by_half = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(by_half.swapaxes(1, 2).reshape(values.shape))


def read_tensors(folder: Path) -> dict[str, Floats]:
    """All tensors of a checkpoint as float32, by name."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: one.float().numpy() for file in files for name, one in load_file(file).items()}


def _stacked(tensors: dict[str, Floats], family: str) -> dict[str, Floats]:
    """Experts of a layer in one tensor a matrix; correction biases under the name that llama.cpp expects."""
    out: dict[str, Floats] = {}
    experts: dict[str, dict[int, Floats]] = {}
    for name, values in tensors.items():
        if family == "mistral4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[f"{name}.weight"] = values
        elif (found := _EXPERT.fullmatch(name)) is None:
            theirs = name.replace("e_score_correction_bias", "e_score_correction.bias")
            if family == "lfm2_moe" and theirs.endswith("expert_bias"):
                theirs += ".bias"
            out[theirs] = values[:, 0] if theirs.endswith("conv.conv.weight") else values
        else:
            root, number, part = found.groups()
            experts.setdefault(f"{root}.{_STACKED.get(part, part)}.weight", {})[int(number)] = values
    if family in ("mixtral", "minimax_m2"):  # the same block under another name
        experts = {name.replace("block_sparse_moe", "mlp"): by_number for name, by_number in experts.items()}
    if family == "qwen3_vl_moe":
        out = _language_model(out)
    if family == "granitemoe":
        out = _experts_apart(out)
    if family == "gpt_oss":
        out = _turns_apart(out)
    for name, by_number in experts.items():
        out[name] = np.stack([by_number[number] for number in sorted(by_number)])
    return out


def _latents_apart(tensors: dict[str, Floats], config: dict[str, Any]) -> dict[str, Floats]:
    """Keys, the other way round, and values in a tensor each, heads first."""
    out: dict[str, Floats] = {}
    nope, value, rank = (config[key] for key in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank"))
    for name, values in tensors.items():
        if not name.endswith("kv_b_proj.weight"):
            out[name] = values
            continue
        keys, held = np.split(values.reshape(-1, nope + value, rank), [nope], axis=1)
        out[name.replace("kv_b_proj", "k_b_proj")] = np.ascontiguousarray(keys.swapaxes(1, 2))
        out[name.replace("kv_b_proj", "v_b_proj")] = np.ascontiguousarray(held)
    return out


def _add_latent(writer: gguf.GGUFWriter, config: dict[str, Any], together: bool) -> None:
    nope, rope_dim, rank = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"))
    writer.add_kv_lora_rank(rank)
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_rope_dimension_count(rope_dim)
    writer.add_key_length(nope + rope_dim if together else rank + rope_dim)
    writer.add_value_length(config["v_head_dim"] if together else rank)
    if not together:
        writer.add_key_length_mla(nope + rope_dim)
        writer.add_value_length_mla(config["v_head_dim"])
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if rope.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
        writer.add_attn_temperature_length(rope["original_max_position_embeddings"])
    is_softmax = config["model_type"] in ("deepseek_v2", "mistral4")
    if config.get("scoring_func") or config["model_type"] == "mistral4":
        kind = gguf.ExpertGatingFuncType.SOFTMAX if is_softmax else gguf.ExpertGatingFuncType.SIGMOID
        writer.add_expert_gating_func(kind)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if "index_topk" in config:
        writer.add_indexer_head_count(config["index_n_heads"])
        writer.add_indexer_key_length(config["index_head_dim"])
        writer.add_indexer_top_k(config["index_topk"])
    if config.get("indexer_types"):
        full = [kind == "full" for kind in config["indexer_types"]]
        writer.add_array("glm-dsa.attention.indexer.types", full)
    if config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(True)


def _delta_tensors(tensors: dict[str, Floats], config: dict[str, Any]) -> dict[str, Floats]:
    """One added to norms about 0, decay rates, projections of q, k and v apart from z; the value heads of
    Qwen3.5 tiled."""
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    is_fused, channels = config["model_type"] == "qwen3_next", 2 * keys * key_dim

    def tiled(values: Floats, width: int, axis: int = 0) -> Floats:
        if is_fused:
            return values
        by_key_head = (keys, heads // keys, width)
        shape = (*values.shape[:axis], *by_key_head, *values.shape[axis + 1 :])
        return np.ascontiguousarray(values.reshape(shape).swapaxes(axis, axis + 1).reshape(values.shape))

    out: dict[str, Floats] = {}
    for name, values in tensors.items():
        root, _, part = name.partition("linear_attn.")
        if not part:
            out[name] = values + np.float32(1) if name.endswith("norm.weight") else values
        elif part == "in_proj_qkvz.weight":
            groups = values.reshape(keys, -1, values.shape[1])
            ends = np.cumsum([key_dim, key_dim, heads // keys * dim])
            q, k, v, z = (one.reshape(-1, values.shape[1]) for one in np.split(groups, ends, axis=1))
            out[f"{root}linear_attn.in_proj_qkv.weight"] = np.concatenate([q, k, v])
            out[f"{root}linear_attn.in_proj_z.weight"] = np.ascontiguousarray(z)
        elif part in ("in_proj_qkv.weight", "conv1d.weight"):
            rows = values.reshape(values.shape[0], -1)
            out[name] = np.concatenate([rows[:channels], tiled(rows[channels:], dim)])
        elif part == "A_log":
            out[name] = tiled(-np.exp(values), 1)
        elif part == "dt_bias":
            out[f"{root}linear_attn.dt_proj.bias"] = tiled(values, 1)
        elif part == "out_proj.weight":
            out[name] = tiled(values, dim, 1)
        else:
            width = {"in_proj_z.weight": dim, "in_proj_a.weight": 1, "in_proj_b.weight": 1}.get(part)
            out[name] = values if width is None else tiled(values, width)
    return out


def _experts_apart(tensors: dict[str, Floats]) -> dict[str, Floats]:
    """Gate and up in a tensor each."""
    out: dict[str, Floats] = {}
    for name, values in tensors.items():
        root = name.partition("block_sparse_moe.")[0]
        if name.endswith("input_linear.weight"):
            for part, one in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                out[f"{root}mlp.experts.{part}_proj.weight"] = np.ascontiguousarray(one)
        elif name.endswith("output_linear.weight"):
            out[f"{root}mlp.experts.down_proj.weight"] = values
        else:
            out[name] = values
    return out


def _turns_apart(tensors: dict[str, Floats]) -> dict[str, Floats]:
    """Gate and up, whose rows take turns, in a tensor each; matrices turned."""
    out: dict[str, Floats] = {}
    for name, values in tensors.items():
        root, _, part = name.rpartition(".")
        kind = "bias" if part.endswith("_bias") else "weight"
        turned = values if kind == "bias" or "experts" not in root else values.swapaxes(1, 2)
        if part.startswith("gate_up_proj"):
            for first, ours in enumerate(("gate", "up")):
                rows = turned[:, first::2]
                out[f"{root}.{ours}_proj.{kind}"] = np.ascontiguousarray(rows)
        elif part.startswith("down_proj"):
            out[f"{root}.down_proj.{kind}"] = np.ascontiguousarray(turned)
        else:
            out[f"{name}.weight" if part == "sinks" else name] = values
    return out


def _language_model(tensors: dict[str, Floats]) -> dict[str, Floats]:
    """That of a model of pictures and text, each expert's matrices turned and apart."""
    out: dict[str, Floats] = {}
    for name, values in tensors.items():
        ours = name.replace("language_model.", "")
        if name.endswith("experts.gate_up_proj"):
            both = np.split(np.ascontiguousarray(values.swapaxes(1, 2)), 2, axis=1)
            out |= {
                ours.replace("gate_up_proj", f"{part}_proj.weight"): one
                for part, one in zip(("gate", "up"), both, strict=True)
            }
        elif name.endswith("experts.down_proj"):
            out[f"{ours}.weight"] = np.ascontiguousarray(values.swapaxes(1, 2))
        elif not name.startswith("model.visual."):
            out[ours] = values
    return out


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], num_blocks: int) -> None:
    rope = config.get("rope_parameters") or config
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(num_blocks)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    kv_heads = config["num_key_value_heads"]
    if "conv_L_cache" in config:
        kv_heads = [kv_heads if kind == "full_attention" else 0 for kind in config["layer_types"]]
    if config["model_type"] == "kimi_linear":
        kv_heads = kimi_ggufs.add_delta(writer, config)
    if config["model_type"] == "glm5_next":
        kv_heads = glm5_ggufs.add_own(writer, config)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_used_count(_first(config, "num_experts_per_tok", "moe_k", "moe_topk"))
    count = _first(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    writer.add_expert_count(count)
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config["model_type"] in ("mixtral", "granitemoe", "glm4_moe", "minimax_m2"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(_first(config, "moe_intermediate_size"))
    if config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if config.get("num_nextn_predict_layers"):
        writer.add_nextn_predict_layers(config["num_nextn_predict_layers"])
    if config["model_type"] == "hunyuan_v1_moe":
        writer.add_expert_shared_feed_forward_length(config["intermediate_size"])
        writer.add_expert_shared_count(_first(config, "num_shared_expert"))
    if "linear_num_key_heads" in config:
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 0.25)))
        writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(config["linear_key_head_dim"])
        writer.add_ssm_group_count(config["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
        writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
        writer.add_full_attention_interval(config.get("full_attention_interval", 4))
    _add_router(writer, config)


def _add_router(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    family = config["model_type"]
    if family in ("glm4_moe", "hy_v3"):  # of the others only where the config names it
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if family in ("glm4_moe", "dots1"):
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    elif family == "hy_v3":
        shared = config["moe_intermediate_size"] * config["num_shared_experts"]
        writer.add_expert_shared_feed_forward_length(shared)
        writer.add_expert_weights_norm(True)
        writer.add_expert_weights_scale(config["router_scaling_factor"])
    elif family == "ernie4_5_moe":
        writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
        writer.add_leading_dense_block_count(config["moe_layer_start_index"])
        writer.add_expert_shared_count(config["moe_num_shared_experts"])
        shared = config["intermediate_size"] // config["num_key_value_heads"]
        writer.add_expert_shared_feed_forward_length(shared)
    elif family == "granitemoe":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    elif family == "qwen3_vl_moe":
        writer.add_rope_dimension_sections([*config["rope_parameters"]["mrope_section"], 0])
        writer.add_num_deepstack_layers(len(config["vision_config"]["deepstack_visual_indexes"]))
    elif family == "lfm2_moe":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_shortconv_l_cache(config["conv_L_cache"])
    elif family == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config["rope_parameters"]["factor"])
        writer.add_rope_scaling_orig_ctx_len(config["rope_parameters"]["original_max_position_embeddings"])
    elif family == "minimax_m2":
        writer.add_expert_feed_forward_length(config["intermediate_size"])


def _first(config: dict[str, Any], *names: str) -> int:
    found = next(config[name] for name in names if config.get(name))
    return int(found[0] if isinstance(found, list) else found)


_RUN = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
# The tokenizer is none that llama.cpp knows by its hash; it is not what is compared.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
for name in ("_set_vocab_glm", "_set_vocab_sentencepiece"):
    setattr(TextModel, name, TextModel._set_vocab_gpt2)
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outfile", sys.argv[3], "--outtype", *sys.argv[4:]]
convert_hf_to_gguf.main()
"""


def llama_cpp() -> Path | None:
    """The folder of llama.cpp's sources, if the environment names one."""
    folder = os.environ.get(CONVERTER)
    return Path(folder) if folder else None


def convert_by_llama_cpp(source: Path, path: Path, dtype: str = "f32", *options: str) -> Path:
    """llama.cpp's own GGUF of a checkpoint. dtype: f32, f16, bf16 or q8_0."""
    command = [sys.executable, "-c", _RUN, str(llama_cpp()), str(source), str(path), dtype, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return path
