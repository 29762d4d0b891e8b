"""Tiny models as GGUFs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from convert_model import Floats, Model

GGUF_TEMPLATES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}


def random_blocks(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Random but sane blocks of a type that the gguf package cannot quantise to. [rows, row_bytes]"""
    kind = gguf.GGMLQuantizationType[dtype]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = int(np.prod(shape[:-1]))
    raw = rng.integers(0, 256, (rows, shape[-1] // block, block_bytes), dtype=np.uint8)
    scale = np.float16(0.002).view(np.uint16).astype("<u2").reshape(1).view(np.uint8)
    places = {
        "Q6_K": (block_bytes - 2,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q3_K": (block_bytes - 2,),
        "Q2_K": (80, 82),
    }
    for at in places[dtype]:
        raw[..., at : at + 2] = scale
    return raw.reshape(rows, -1)


def write_gguf(
    model: Model,
    path: Path,
    *,
    experts: str = "Q8_0",
    dense: str = "Q8_0",
    merged: bool = True,
    fused: bool = False,
    split: int = 0,
) -> Path:
    """A GGUF; fused: gate and up of a layer's experts in one tensor; split: tensors a file. Returns the first
    file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "qwen3moe", split_max_tensors=split)
    s = model.shape
    writer.add_block_count(s.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(s.hidden)
    writer.add_feed_forward_length(2 * s.hidden)
    writer.add_expert_feed_forward_length(s.intermediate)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.top_k)
    _add_dense(writer, model, dense)
    if fused:
        _add_fused_experts(writer, model, experts)
    else:
        _add_experts(writer, model, experts, merged=merged)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if split:
        return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]
    return path


def _add_dense(writer: gguf.GGUFWriter, model: Model, dense: str) -> None:
    for name, values in model.weights.items():
        if ".experts." in name:
            continue
        layer = name.split(".")[2] if ".layers." in name else None
        ours = GGUF_TEMPLATES[name if layer is None else name.split(".", 3)[3]]
        is_float = values.ndim == 1 or ours == "ffn_gate_inp.weight"
        add_tensor(
            writer, ours if layer is None else f"blk.{layer}.{ours}", values, "F32" if is_float else dense
        )


def _add_fused_experts(writer: gguf.GGUFWriter, model: Model, experts: str) -> None:
    """As llama.cpp's converter writes with --fuse-gate-up-exps: gate rows first, then up rows, of each
    expert.
    """
    for i in range(model.shape.layers):
        numbers = range(model.shape.experts)
        both = [np.concatenate([model.expert(i, e, "gate"), model.expert(i, e, "up")]) for e in numbers]
        add_tensor(writer, f"blk.{i}.ffn_gate_up_exps.weight", np.stack(both), experts)
        down = np.stack([model.expert(i, e, "down") for e in numbers])
        add_tensor(writer, f"blk.{i}.ffn_down_exps.weight", down, experts)


def _add_experts(writer: gguf.GGUFWriter, model: Model, experts: str, *, merged: bool) -> None:
    for i in range(model.shape.layers):
        for part in ("gate", "up", "down"):
            names = [
                f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight" for e in range(model.shape.experts)
            ]
            if merged:
                values = np.stack([model.weights[name] for name in names])
                raw = (
                    np.stack([model.blocks[name] for name in names]) if experts in ("Q4_K", "Q6_K") else None
                )
                add_tensor(writer, f"blk.{i}.ffn_{part}_exps.weight", values, experts, raw)
                continue
            for e, name in enumerate(names):
                raw = model.blocks.get(name) if experts in ("Q4_K", "Q6_K") else None
                add_tensor(writer, f"blk.{i}.ffn_{part}.{e}.weight", model.weights[name], experts, raw)


def add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    values: Floats,
    dtype: str,
    raw: npt.NDArray[np.uint8] | None = None,
) -> None:
    """raw: the tensor's blocks; None: quantised from values."""
    kind = gguf.GGMLQuantizationType[dtype]
    if raw is None:
        raw = gguf.quants.quantize(values, kind)
    writer.add_tensor(name, raw, raw_dtype=kind)
