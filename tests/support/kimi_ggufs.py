"""Kimi Linear in the words that the writer of tiny GGUFs knows, and its tensors as llama.cpp's converter has
them."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_NAMES = {
    "model_max_length": "max_position_embeddings",
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}


def usual_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the usual names, and what the family does without saying so."""
    usual = {_NAMES.get(key, key): value for key, value in config.items()}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return usual | {"scoring_func": "sigmoid", "rope_parameters": rope}


def add_delta(writer: gguf.GGUFWriter, config: dict[str, Any]) -> list[int]:
    """Writes what the delta rule has. Returns each layer's heads of keys and values."""
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_kda_head_dim(config["linear_head_dim"])
    return [int(kind == "full_attention") for kind in config["layer_types"]]


def delta_tensors(tensors: dict[str, Floats]) -> dict[str, Floats]:
    """Rates of decay, convolutions in four dimensions, and names that the gguf package knows."""
    out: dict[str, Floats] = {}
    for name, values in tensors.items():
        if name.endswith("A_log"):
            out[name] = -np.exp(values)
        elif name.endswith("dt_bias"):
            out[name.replace("dt_bias", "dt_proj.bias")] = values
        elif name.endswith("conv1d.weight"):
            out[name] = values.reshape(1, len(values), 1, -1)
        else:
            out[name.replace("block_sparse_moe.", "mlp.")] = values
    return out
