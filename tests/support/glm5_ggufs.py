"""GLM-5.3 in the words that the writer of tiny GGUFs knows, and what of it the gguf package does not know, as
llama.cpp's converter writes it.
"""

from __future__ import annotations

import re
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tests.support import kimi_ggufs

Floats = npt.NDArray[np.float32]
NAME = "glm5-next"
_OWN = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.indexer\.index_k)?(hc_|pool_compress_)(\w+)")


def usual_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config with what the family does without saying so."""
    usual = {"scoring_func": "sigmoid", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    dense = config["mlp_layer_types"].count("dense")
    # Its types of indices are written here: the other writer has the key of another architecture.
    own = {"first_k_dense_replace": dense, "own_index": config["indexer_types"], "indexer_types": None}
    return config | usual | own


def add_own(writer: gguf.GGUFWriter, config: dict[str, Any]) -> list[int]:
    """Writes what the family has beside latent attention and experts. Returns each layer's heads of keys and
    values."""
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_kda_head_dim(config["linear_head_dim"])
    writer.add_float32(f"{NAME}.kda.gate_lower_bound", config["linear_lower_bound"])
    writer.add_uint32(f"{NAME}.attention.indexer.kpool", config["index_kpool"])
    writer.add_bool(f"{NAME}.attention.indexer.kpool_select_tail", True)
    writer.add_array(f"{NAME}.attention.indexer.types", [kind == "full" for kind in config["own_index"]])
    writer.add_uint32(f"{NAME}.hyper_connection.count", config["hc_mult"])
    writer.add_uint32(f"{NAME}.hyper_connection.sinkhorn_iterations", config["hc_sinkhorn_iters"])
    writer.add_float32(f"{NAME}.hyper_connection.epsilon", config["hc_eps"])
    limits = [config["swiglu_limit"]] * config["num_hidden_layers"]
    writer.add_swiglu_clamp_exp(limits)
    writer.add_swiglu_clamp_shexp(limits)
    return [int(kind != "linear_attention") for kind in config["layer_types"]]


def language_tensors(tensors: dict[str, Floats]) -> dict[str, Floats]:
    """Those of the language model, as llama.cpp's converter has the delta rule's."""
    own = {name.replace("language_model.", ""): one for name, one in tensors.items() if "visual" not in name}
    return kimi_ggufs.delta_tensors(own)


def name_of(name: str, num_blocks: int) -> str | None:
    """llama.cpp's name of a tensor that the other architectures with an index do not have."""
    if (found := _OWN.fullmatch(name)) is not None:
        layer, kind, part = found.groups()
        return f"blk.{layer}.{'hc_' if kind == 'hc_' else 'indexer_compressor_'}{part}.weight"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.KIMI_LINEAR, num_blocks)
    found_there: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    return found_there
