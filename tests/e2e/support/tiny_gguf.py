"""The committed model as a GGUF that llama.cpp loads, with metadata of a test's choice."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

DENSE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}


@functools.cache
def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint as float32, by name."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: one.float().numpy() for file in files for name, one in load_file(file).items()}


def gguf_tensors(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """GGUF names, a layer's experts stacked."""
    out = {}
    for name, values in tensors.items():
        parts = name.split(".")
        if name in DENSE:
            out[DENSE[name]] = values
        elif "experts" not in parts:
            out[f"blk.{parts[2]}.{DENSE['.'.join(parts[3:-1])]}.weight"] = values
    for layer in range(config["num_hidden_layers"]):
        for part in ("gate", "up", "down"):
            prefix = f"model.layers.{layer}.mlp.experts"
            names = [f"{prefix}.{e}.{part}_proj.weight" for e in range(config["num_experts"])]
            out[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack([tensors[one] for one in names])
    return out


def write_tiny_gguf(
    path: Path,
    checkpoint: Path,
    rope: dict[str, Any],
    *,
    tensors: dict[str, np.ndarray] | None = None,
    kind: str = "Q8_0",
) -> Path:
    """rope: keys below ``qwen3moe.rope.``. tensors: instead of the checkpoint's, by its names."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in rope.items():
        add[type(value)](f"qwen3moe.rope.{key}", value)
    _add_vocabulary(writer, checkpoint, config["vocab_size"])
    values = read_tensors(checkpoint) if tensors is None else tensors
    for name, one in gguf_tensors(values, config).items():
        is_float = one.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        chosen = gguf.GGMLQuantizationType["F32" if is_float else kind]
        writer.add_tensor(name, gguf.quants.quantize(one, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Path, size: int) -> None:
    data = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    tokens, types = [f"[PAD{i}]" for i in range(size)], [gguf.TokenType.UNUSED] * size
    for token, number in data["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for item in data["added_tokens"]:
        tokens[item["id"]], types[item["id"]] = item["content"], gguf.TokenType.CONTROL
    merges = [one if isinstance(one, str) else " ".join(one) for one in data["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))


def llama_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """llama.cpp's logits [tokens, vocab] of the same file. Needs the llama_cpp package."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=2048, n_threads=1, logits_all=True, verbose=False)
    try:
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])
    finally:
        model.close()


def mean_kl(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean over tokens of the divergence of two next-token distributions given as logits [tokens, vocab]."""
    p, q = (
        one.astype(np.float64) - np.logaddexp.reduce(one.astype(np.float64), 1, keepdims=True)
        for one in (expected, found)
    )
    return float((np.exp(p) * (p - q)).sum(1).mean())
