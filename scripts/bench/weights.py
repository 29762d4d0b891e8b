"""Weights of one model from a checkpoint, a GGUF or a bundle: float32, oriented as Hugging Face has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import numpy.typing as npt

from krasis.formats.bundle.reader import Bundle
from krasis.formats.checkpoints.ggml_blocks import dequantize
from krasis.formats.checkpoints.gguf import GgufFile
from krasis.formats.layouts import Int8RowsLayout
from krasis.runtime.cpu.weights import Int8Weight, LayerWeights, load_weights, to_float32
from scripts.models.model_files import Checkpoint, from_bf16

Floats = npt.NDArray[np.float32]
SAMPLED_EXPERTS = 4  # a layer
PARTS = ("gate", "up", "down")


class Source(Protocol):
    """One model's weights. experts: of a layer."""

    num_layers: int
    num_experts: int

    def dense(self, name: str) -> Floats:
        """A tensor by its Hugging Face name, such as ``model.layers.0.self_attn.q_proj.weight``."""

    def expert(self, layer: int, number: int) -> tuple[Floats, Floats, Floats]:
        """gate, up [intermediate, hidden] and down [hidden, intermediate]."""

    def expert_bits(self) -> float:
        """Bits an expert weight takes, scales included, padding between experts not."""


class CheckpointSource:
    """A BF16 folder."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = Checkpoint(folder)
        config = self._checkpoint.config
        self.num_layers, self.num_experts = int(config["num_hidden_layers"]), int(config["num_experts"])

    def dense(self, name: str) -> Floats:
        if name == "lm_head.weight" and name not in self._checkpoint.names():
            name = "model.embed_tokens.weight"
        return from_bf16(self._checkpoint.tensor(name))

    def expert(self, layer: int, number: int) -> tuple[Floats, Floats, Floats]:
        prefix = f"model.layers.{layer}.mlp.experts.{number}"
        gate, up, down = (self.dense(f"{prefix}.{part}_proj.weight") for part in PARTS)
        return gate, up, down

    def expert_bits(self) -> float:
        return 16.0


class GgufSource:
    """A GGUF of the qwen3moe architecture."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile.open(path)
        self.num_layers = int(str(self._file.metadata["qwen3moe.block_count"]))
        self.num_experts = int(str(self._file.metadata["qwen3moe.expert_count"]))
        self._names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, self.num_layers)

    def dense(self, name: str) -> Floats:
        own = self._names.get_name(name, try_suffixes=(".weight",))
        if name == "lm_head.weight" and own not in self._file.tensors:
            own = "token_embd.weight"
        if own is None:
            raise KeyError(name)
        info = self._file.info(own)
        return dequantize(self._file.view(own), info.ggml_type, info.shape, own)

    def expert(self, layer: int, number: int) -> tuple[Floats, Floats, Floats]:
        gate, up, down = (self._part(f"blk.{layer}.ffn_{part}_exps.weight", number) for part in PARTS)
        return gate, up, down

    def _part(self, name: str, number: int) -> Floats:
        info = self._file.info(name)
        raw = self._file.view(name).reshape(self.num_experts, -1)[number]
        return dequantize(np.ascontiguousarray(raw), info.ggml_type, info.shape[1:], name)

    def expert_bits(self) -> float:
        infos = [info for name, info in self._file.tensors.items() if "_exps." in name]
        return 8 * sum(info.num_bytes for info in infos) / sum(int(np.prod(info.shape)) for info in infos)


class BundleSource:
    """A bundle, with the experts of one of its tiers."""

    def __init__(self, path: Path, tier: str) -> None:
        self._bundle = Bundle.open(path)
        self._weights = load_weights(self._bundle, tier)
        arch = self._weights.architecture
        self.num_layers, self.num_experts = arch.num_layers, arch.num_experts

    def dense(self, name: str) -> Floats:
        w = self._weights
        if name == "model.embed_tokens.weight":
            return to_float32(w.embedding.data, w.embedding.dtype)
        if name == "model.norm.weight":
            return w.final_norm
        if name == "lm_head.weight":
            return _rows(w.lm_head)[: w.architecture.vocab_size]
        _, _, number, part = name.split(".", 3)
        return self._of_layer(w.layers[int(number)], part)

    def _of_layer(self, layer: LayerWeights, part: str) -> Floats:
        a = self._weights.architecture
        plain = {
            "input_layernorm.weight": layer.vector("attention.norm"),
            "self_attn.q_norm.weight": layer.vector("attention.q_norm"),
            "self_attn.k_norm.weight": layer.vector("attention.k_norm"),
            "post_attention_layernorm.weight": layer.vector("experts.norm"),
        }
        if part in plain:
            return plain[part]
        if part == "self_attn.o_proj.weight":
            return _rows(layer.int8("attention.output"))
        if part == "mlp.gate.weight":
            return to_float32(layer.matrix("experts.router").data, layer.matrix("experts.router").dtype)
        ends = np.cumsum([a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim])
        which = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight").index(part)
        return np.split(_rows(layer.int8("attention.qkv")), ends)[which]

    def expert(self, layer: int, number: int) -> tuple[Floats, Floats, Floats]:
        a, w = self._weights.architecture, self._weights
        record = w.layers[layer].experts[number]
        return w.expert_layout.unpack_expert(record, a.hidden_size, a.expert_intermediate_size)

    def expert_bits(self) -> float:
        a = self._weights.architecture
        record = self._weights.expert_layout.expert_record(a.hidden_size, a.expert_intermediate_size)
        sections = (record.w13_codes, record.w13_scales, record.w2_codes, record.w2_scales)
        num_weights = 3 * a.hidden_size * a.expert_intermediate_size
        return 8 * sum(section.num_bytes for section in sections) / num_weights


def _rows(weight: Int8Weight) -> Floats:
    rows: Any = Int8RowsLayout().unpack(weight.codes, weight.scales)
    return np.asarray(rows, np.float32)


def sampled(source: Source, count: int = SAMPLED_EXPERTS) -> Iterator[tuple[int, int]]:
    """(layer, expert) pairs spread over the model; all of them if there are few."""
    step = max(1, source.num_experts // count)
    for layer in range(source.num_layers):
        for number in range(layer % step, source.num_experts, step):
            yield layer, number


def relative_mse(found: Source, exact: Source, count: int = SAMPLED_EXPERTS) -> float:
    """Squared error of the sampled experts over the squares of the exact ones."""
    error = total = 0.0
    for layer, number in sampled(exact, count):
        for left, right in zip(found.expert(layer, number), exact.expert(layer, number), strict=True):
            error += float(np.square(left - right, dtype=np.float64).sum())
            total += float(np.square(right, dtype=np.float64).sum())
    return error / total
