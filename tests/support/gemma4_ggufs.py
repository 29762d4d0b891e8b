"""Gemma 4 as a GGUF, as llama.cpp's converter writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_OWN = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "router.proj.weight": "ffn_gate_inp.weight",
    "layer_scalar": "layer_output_scale.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}


def gemma4_gguf(
    config: Mapping[str, Any], tensors: Mapping[str, Floats], path: Path, experts: str, dense: str
) -> Path:
    """experts, dense: types of the matrices; vectors and routers are F32."""
    count = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GEMMA4])
    windowed = [kind == "sliding_attention" for kind in config["layer_types"]]
    own = next(iter(config["per_layer_config"].values()))
    rope = config["rope_parameters"]
    _add_sizes(writer, config)
    writer.add_sliding_window_pattern(windowed)
    writer.add_head_count_kv(
        [config["num_key_value_heads"] if one else own["num_key_value_heads"] for one in windowed]
    )
    for head_dim, ending in ((own["head_dim"], ""), (config["head_dim"], "_swa")):
        for part in ("key_length", "value_length"):
            getattr(writer, f"add_{part}{ending}")(head_dim)
        getattr(writer, f"add_rope_dimension_count{ending}")(head_dim)
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, count)
    turning = int(own["head_dim"] * rope["full_attention"]["partial_rotary_factor"] / 2)
    still = own["head_dim"] // 2 - turning
    _add(writer, "rope_freqs.weight", np.array([1.0] * turning + [1e30] * still, np.float32), "F32")
    for name, values in tensors.items():
        parts = name.split(".", 3)
        if parts[-1] in _OWN:
            theirs = f"blk.{parts[2]}.{_OWN[parts[-1]]}"
        else:
            theirs = names.get_name(name, try_suffixes=(".weight",))
        is_float = values.ndim == 1 or "ffn_gate_inp" in theirs
        _add(writer, theirs, values, "F32" if is_float else experts if "_exps" in theirs else dense)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, values: Floats, kind: str) -> None:
    raw_type = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(values, raw_type), raw_dtype=raw_type)


def _add_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["top_k_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(0)
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
