"""Write a Qwen3-MoE checkpoint as GGUF, piece by piece, as llama.cpp's own converter lays it out.

Experts of a layer merge into one tensor `[experts, out, in]`; norms and routers stay float32, all
matrices take the chosen type. Nothing in the file depends on when or where it was made.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from scripts.models.model_files import Bf16Bits, Checkpoint, Floats, from_bf16

Bytes = npt.NDArray[np.uint8]

BLOCK = 32
PIECE_VALUES = 1 << 21
GGUF_TYPES: dict[str, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (gguf.GGMLQuantizationType.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (gguf.GGMLQuantizationType.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "mxfp4": (gguf.GGMLQuantizationType.MXFP4, gguf.LlamaFileType.MOSTLY_MXFP4_MOE),
}
# The largest float32 below one half: truncating x + copysign(this, x) rounds halves away from zero
# and, unlike a plain 0.5, leaves the number just below one half at zero.
ALMOST_HALF = np.nextafter(np.float32(0.5), np.float32(0.0))


def quantize_q8_0(values: Floats) -> Bytes:
    """float32 [n], n a multiple of 32, to Q8_0 bytes [n / 32 * 34]; bit for bit ggml's."""
    blocks = values.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1) / np.float32(127)
    inverse = np.zeros_like(scale)
    np.divide(np.float32(1), scale, out=inverse, where=scale != 0)
    scaled = blocks * inverse[:, None]
    scaled += np.copysign(ALMOST_HALF, scaled)
    out = np.empty((len(blocks), 2 + BLOCK), dtype=np.uint8)
    out[:, :2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    out[:, 2:] = scaled.astype(np.int8).view(np.uint8)
    return out.reshape(-1)


def encoder(kind: gguf.GGMLQuantizationType) -> Callable[[Bf16Bits], Bytes]:
    """What turns BF16 bits [n] into the type's bytes."""
    types = gguf.GGMLQuantizationType
    if kind == types.BF16:
        return lambda bits: np.ascontiguousarray(bits).view(np.uint8)
    if kind == types.Q8_0:
        return lambda bits: quantize_q8_0(from_bf16(bits))

    def generic(bits: Bf16Bits) -> Bytes:
        rows = from_bf16(bits)
        if kind not in (types.F32, types.F16):
            rows = rows.reshape(-1, BLOCK)
        raw: Bytes = np.ascontiguousarray(gguf.quants.quantize(rows, kind)).view(np.uint8)
        return raw.reshape(-1)

    return generic


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file: its name, the checkpoint's tensors in it, dimensions and type."""

    name: str
    sources: tuple[str, ...]
    dims: tuple[int, ...]
    kind: gguf.GGMLQuantizationType

    def num_bytes(self) -> int:
        """Size in the file, without padding. Raises ValueError for rows of broken blocks."""
        row = gguf.quant_shape_to_byte_shape(self.dims, self.kind)
        return int(np.prod(row, dtype=np.int64))


def plan_tensors(checkpoint: Checkpoint, kind: gguf.GGMLQuantizationType) -> list[GgufTensor]:
    """Every tensor of the file, in order. Raises ValueError for a name that GGUF has none for."""
    num_layers = int(checkpoint.config["num_hidden_layers"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, num_layers)
    merged: dict[str, dict[int, str]] = {}
    for source in checkpoint.names():
        parts = source.split(".")
        expert = int(parts.pop(parts.index("experts") + 1)) if "experts" in parts else 0
        merged.setdefault(".".join(parts), {})[expert] = source
    plan: list[GgufTensor] = []
    for hub_name, by_expert in merged.items():
        # By number: an index sorted by name has expert 10 before expert 2.
        sources = [by_expert[expert] for expert in sorted(by_expert)]
        name = names.get_name(hub_name, try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"{hub_name}: qwen3moe has no such tensor")
        dims = tuple(checkpoint.tensor(sources[0]).shape)
        if "experts" in hub_name.split("."):
            dims = (len(sources), *dims)
        plain = len(dims) == 1 or name.endswith("ffn_gate_inp.weight")
        stored = gguf.GGMLQuantizationType.F32 if plain else kind
        plan.append(GgufTensor(name, tuple(sources), dims, stored))
    return plan


def _add_rope(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_rope_freq_base(float(config["rope_theta"]))
    scaling = config.get("rope_scaling")
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))


def add_architecture(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    """The `general.*` and `qwen3moe.*` keys but for the file type."""
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    _add_rope(writer, config)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """The `tokenizer.*` keys; a folder without tokenizer.json gives a file without a vocabulary.

    Ids past the tokenizer's are filled with unused tokens. Raises ValueError when the tokenizer
    has more tokens than the model.
    """
    if not (folder / "tokenizer.json").is_file():
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(vocab_size)
        return
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    ids: dict[str, int] = dict(data["model"]["vocab"])
    special = {item["content"]: int(item["id"]) for item in data["added_tokens"] if item["special"]}
    ids.update({item["content"]: int(item["id"]) for item in data["added_tokens"]})
    if max(ids.values()) >= vocab_size:
        raise ValueError(f"tokenizer has ids up to {max(ids.values())}, the model {vocab_size}")
    for token, index in ids.items():
        tokens[index] = token
        types[index] = gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    pairs = data["model"]["merges"]
    writer.add_token_merges([item if isinstance(item, str) else " ".join(item) for item in pairs])
    pad = ids[settings["pad_token"]]
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_pad_token_id(pad)
    # There is no such token; without the key, readers of `gpt2` vocabularies assume number 11.
    writer.add_bos_token_id(pad)
    writer.add_add_bos_token(False)
    writer.add_chat_template(settings["chat_template"])


def _pieces(checkpoint: Checkpoint, tensor: GgufTensor) -> Iterator[Bf16Bits]:
    # Whole rows always: a block of a quantised type never spans two rows.
    step = max(1, PIECE_VALUES // tensor.dims[-1]) * tensor.dims[-1]
    for source in tensor.sources:
        flat = checkpoint.tensor(source).reshape(-1)
        for first in range(0, flat.size, step):
            yield flat[first : first + step]


def write_gguf(folder: Path, out: Path, type_name: str, name: str, *, progress: bool = True) -> int:
    """Write the checkpoint in `folder` to the file `out`; return its size in bytes.

    Memory stays at a few pieces of 2 million values. The file gets its name when it is whole.
    Raises ValueError when a tensor cannot take the type, KeyError for a type not in GGUF_TYPES.
    """
    kind, file_type = GGUF_TYPES[type_name]
    checkpoint = Checkpoint(folder)
    plan = plan_tensors(checkpoint, kind)
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    add_architecture(writer, checkpoint.config, name)
    writer.add_file_type(file_type)
    add_tokenizer(writer, folder, int(checkpoint.config["vocab_size"]))
    for tensor in plan:
        writer.add_tensor_info(
            tensor.name, tensor.dims, np.dtype(np.float32), tensor.num_bytes(), tensor.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if writer.fout is None:
        raise ValueError(f"{partial}: the GGUF writer opened no file")
    file = writer.fout[0]
    total = sum(tensor.num_bytes() for tensor in plan)
    with tqdm(total=total, desc=out.name, unit="B", unit_scale=True, disable=not progress) as bar:
        writer.write_padding(file, file.tell())
        for tensor in plan:
            encode = encoder(tensor.kind)
            # The writer takes whole tensors only, which here reach a gigabyte: straight to its file.
            for piece in _pieces(checkpoint, tensor):
                file.write(encode(piece).data)
                bar.update(piece.nbytes * tensor.num_bytes() // (2 * int(np.prod(tensor.dims))))
            writer.write_padding(file, tensor.num_bytes())
    writer.close()
    partial.replace(out)
    return out.stat().st_size
