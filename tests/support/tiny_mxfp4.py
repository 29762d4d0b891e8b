"""A tiny gpt-oss as the hub has it: experts in MXFP4, in pairs of codes and scales."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from tests.support.tiny_checkpoints import tiny

Bytes = npt.NDArray[np.uint8]
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def tiny_mxfp4(folder: Path, seed: int = 0) -> Path:
    """The checkpoint, and beside it ``FOLDER-bf16``: what transformers dequantises it to, in float32."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tiny("gpt_oss", folder, seed=seed)
    path = folder / "model.safetensors"
    tensors, plain = load_file(path), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        codes, scales = pairs_of(tensors.pop(name).float().numpy().swapaxes(1, 2))
        tensors[f"{name}_blocks"] = torch.from_numpy(codes)
        tensors[f"{name}_scales"] = torch.from_numpy(scales)
        plain[name] = convert_moe_packed_tensors(
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32
        ).contiguous()
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    twin = folder.with_name(f"{folder.name}-bf16")
    twin.mkdir()
    dense = {name: one for name, one in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    save_file(dense | plain, twin / "model.safetensors", {"format": "pt"})
    (twin / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


def pairs_of(weights: npt.NDArray[np.float32]) -> tuple[Bytes, Bytes]:
    """Codes [E, n, k/32, 16], byte j with elements 2 j (low) and 2 j + 1, and scales [E, n, k/32]."""
    blocks = gguf.quants.quantize(np.ascontiguousarray(weights), gguf.GGMLQuantizationType.MXFP4)
    split = blocks.reshape(*weights.shape[:2], -1, 17)
    halves = split[..., 1:]
    codes = np.concatenate([halves & 15, halves >> 4], axis=-1)  # in the order of the elements
    return codes[..., ::2] | codes[..., 1::2] << 4, np.ascontiguousarray(split[..., 0])
