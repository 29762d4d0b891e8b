"""Tiny random Qwen3-MoE models, written as Hugging Face folders and GGUFs, with their weights at hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from convert_gguf import random_blocks, write_gguf
from convert_shape import Shape

Floats = npt.NDArray[np.float32]

# The least that the tokenizers library reads.
TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """float32 to BF16 bits, round to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    """BF16 bits to float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, npt.NDArray[Any]]]) -> None:
    """A safetensors file: name to (dtype, array)."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


@dataclass
class Model:
    """Weights (float32, BF16 values unless a test changes them) and writers of both kinds."""

    shape: Shape
    seed: int = 0
    weights: dict[str, Floats] = field(default_factory=dict)
    blocks: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        if not self.weights:
            for name, shape in self.shape.tensor_shapes().items():
                values = rng.standard_normal(shape).astype(np.float32) * 0.05
                if name.endswith("norm.weight"):
                    values += 1
                self.weights[name] = from_bf16(to_bf16(values))

    def expert(self, layer: int, expert: int, part: str) -> Floats:
        """One expert's matrix."""
        return self.weights[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"]

    def with_blocks(self, dtype: str) -> Model:
        """A model whose expert weights are the values of random blocks of ``dtype`` (rounded to BF16)."""
        rng = np.random.default_rng(self.seed + 1)
        weights, blocks = dict(self.weights), {}
        for name, values in self.weights.items():
            if ".experts." in name:
                raw = random_blocks(rng, dtype, values.shape)
                blocks[name] = raw
                exact = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[dtype])
                weights[name] = from_bf16(to_bf16(exact.reshape(values.shape)))
        return Model(self.shape, self.seed, weights, blocks)

    def write_hf(
        self,
        folder: Path,
        *,
        num_files: int = 2,
        dtype: str = "BF16",
        fused: bool = False,
        tokenizer: bool = True,
    ) -> Path:
        """A checkpoint folder."""
        folder.mkdir(parents=True, exist_ok=True)
        encode: dict[str, Callable[[Floats], npt.NDArray[Any]]] = {
            "BF16": to_bf16,
            "F16": lambda v: v.astype(np.float16),
            "F32": lambda v: v,
        }
        tensors = {
            name: (dtype, encode[dtype](values)) for name, values in self.hf_weights(fused=fused).items()
        }
        names = list(tensors)
        pieces = [names[i::num_files] for i in range(num_files)]
        if num_files == 1:
            write_safetensors(folder / "model.safetensors", tensors)
        else:
            weight_map = {}
            for i, piece in enumerate(pieces):
                file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
                write_safetensors(folder / file, {name: tensors[name] for name in piece})
                weight_map |= dict.fromkeys(piece, file)
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(self.shape.config()))
        if tokenizer:
            (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
            (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
        return folder

    def hf_weights(self, *, fused: bool) -> dict[str, Floats]:
        """Weights by hub name; fused: experts stacked as transformers 5 keeps them in memory."""
        if not fused:
            return self.weights
        out = {name: values for name, values in self.weights.items() if ".experts." not in name}
        for i in range(self.shape.layers):
            experts = range(self.shape.experts)
            gate_up = [np.concatenate([self.expert(i, e, "gate"), self.expert(i, e, "up")]) for e in experts]
            out[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.stack(gate_up)
            out[f"model.layers.{i}.mlp.experts.down_proj"] = np.stack(
                [self.expert(i, e, "down") for e in experts]
            )
        return out

    def write_gguf(self, path: Path, **options: Any) -> Path:
        """See ``convert_gguf.write_gguf``."""
        return write_gguf(self, path, **options)
