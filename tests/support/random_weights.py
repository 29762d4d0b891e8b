"""Random packed weights of any model, and the checkpoint that transformers reads their dequantised twin
from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.layouts import CpuTileLayout, Int8RowsLayout, MarlinLayout
from krasis.formats.layouts.matrix import MatrixView
from krasis.formats.models.family import Source
from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.recurrent import ChannelDelta
from krasis.formats.models.registry import family_of_model_type
from krasis.formats.models.spec import Layer, ModelSpec
from krasis.formats.models.tensor import Tensor
from krasis.formats.models.tensors import layer_tensors, top_tensors
from krasis.formats.native import Pool
from krasis.runtime.cpu.weights import (
    FloatWeight,
    Int8Weight,
    LayerWeights,
    ModelWeights,
    Weight,
    to_float32,
)

Array = npt.NDArray[Any]
FUSED = {
    "granitemoe": {
        "experts.gate_up": "model.layers.{i}.block_sparse_moe.input_linear.weight",
        "experts.down": "model.layers.{i}.block_sparse_moe.output_linear.weight",
    },
    "gemma4": {
        "experts.gate_up": "model.layers.{i}.experts.gate_up_proj",
        "experts.down": "model.layers.{i}.experts.down_proj",
    },
    "mistral4": {
        "experts.gate_up": "model.layers.{i}.mlp.experts.gate_up_proj",
        "experts.down": "model.layers.{i}.mlp.experts.down_proj",
    },
}
"""The hub's names of what holds all experts of a layer."""
State = dict[str, npt.NDArray[np.float32]]


def to_bf16(values: Array) -> Array:
    """uint16 bits, by truncation: exact values are not the point here."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Packer:
    """Random weights packed as a bundle has them."""

    def __init__(
        self, spec: ModelSpec, experts: CpuTileLayout | MarlinLayout, pool: Pool, seed: int = 0
    ) -> None:
        self.spec, self.experts, self.pool = spec, experts, pool
        self.random = np.random.default_rng(seed)

    def bf16(self, *shape: int, scale: float = 0.05, mean: float = 0.0) -> Array:
        return to_bf16(mean + scale * self.random.standard_normal(shape, dtype=np.float32))

    def int8(self, n: int, k: int) -> Int8Weight:
        rows = -(-n // 32) * 32
        matrix = np.zeros((rows, k), dtype=np.uint16)
        matrix[:n] = self.bf16(n, k)
        codes = np.zeros((rows // 32, k // 4, 32, 4), dtype=np.int8)
        scales = np.zeros(rows, dtype=np.float32)
        Int8RowsLayout().pack(self.pool, MatrixView(matrix, "BF16"), codes, scales)
        return Int8Weight(codes, scales)

    def weight(self, tensor: Tensor) -> Weight:
        if tensor.store == "int8_rows":
            return self.int8(*tensor.shape)
        if tensor.store == "f32" and len(tensor.shape) > 1:
            return to_float32(self.bf16(*tensor.shape, scale=0.5), "BF16")
        if len(tensor.shape) > 1:
            return FloatWeight(self.bf16(*tensor.shape, scale=0.2), "BF16")
        is_norm = tensor.name.endswith("norm")
        values = self.bf16(*tensor.shape, scale=0.2 if is_norm else 0.1, mean=1.0 if is_norm else 0.0)
        return to_float32(values, "BF16")

    def records(self, layer: Layer) -> Array | None:
        mlp = layer.experts
        if mlp is None:
            return None
        hidden, inner = self.spec.hidden, mlp.intermediate
        record_bytes = self.experts.expert_record(hidden, inner, mlp.gated).record_bytes
        records = np.zeros((mlp.count, record_bytes), dtype=np.uint8)
        for record in records:
            parts = [self.bf16(inner, hidden), self.bf16(inner, hidden), self.bf16(hidden, inner)]
            gate, up, down = (MatrixView(part, "BF16") for part in parts)
            self.experts.pack_expert(self.pool, gate if mlp.gated else None, up, down, record)
        return records

    def layer(self, layer: Layer) -> LayerWeights:
        tensors = {t.name: self.weight(t) for t in layer_tensors(self.spec, layer) if t.store != "experts"}
        return LayerWeights(layer, tensors, self.records(layer))

    def model(self) -> ModelWeights:
        spec = self.spec
        return ModelWeights(
            spec=spec,
            embedding=FloatWeight(self.bf16(spec.vocab, spec.hidden, scale=1.0), "BF16"),
            layers=tuple(self.layer(layer) for layer in spec.layers),
            final_norm=to_float32(self.bf16(spec.hidden, scale=0.2, mean=1.0), "BF16"),
            lm_head=self.int8(spec.vocab, spec.hidden),
            expert_layout=self.experts,
        )


def dequantised_state(weights: ModelWeights) -> State:
    """Every weight in float32 by the hub's name, experts one by one."""
    family = family_of_model_type(weights.spec.family)
    if family is None:
        raise ValueError(f"no such family: {weights.spec.family}")
    names, spec = family.names, weights.spec
    state = {
        names["embedding"].hf[0]: to_float32(weights.embedding.data, weights.embedding.dtype),
        names["lm_head"].hf[0]: _rows(weights.lm_head)[: spec.vocab],
    }
    for tensor in top_tensors(spec)[1][:-1]:
        weight = weights.end.get(tensor.name, weights.final_norm)
        values = to_float32(weight.data, weight.dtype) if isinstance(weight, FloatWeight) else weight
        _put(state, names[tensor.name], names[tensor.name].hf[0], values, None)
    for index, layer in enumerate(weights.layers):
        for tensor in layer_tensors(spec, layer.layer):
            if tensor.store != "experts":
                _parts(state, tensor, layer.tensors[tensor.name], names, index, spec)
        state |= _latent(layer, names, index)
        state |= _experts(weights, layer, names, index)
    return state


def _parts(
    state: State,
    tensor: Tensor,
    weight: Weight,
    names: Mapping[str, Source],
    index: int,
    spec: ModelSpec,
) -> None:
    if isinstance(weight, Int8Weight):
        values = _rows(weight)[: tensor.shape[0]]
    elif isinstance(weight, FloatWeight):
        values = to_float32(weight.data, weight.dtype)
    else:
        values = weight
    if tensor.name == "experts.router.correction_bias" and spec.family == "ernie4_5_moe":
        values = values[None]
    if tensor.name in ("attention.k_b", "attention.v_b"):
        return  # see _latent
    if tensor.per_expert and tensor.name != "experts.down.bias" and spec.family == "gpt_oss":
        return  # see _turns
    if tensor.store == "table":  # filled up with zeros to the largest of all layers
        values = values[: 1 + np.flatnonzero(values.any(axis=1))[-1]]
        _put(state, names[tensor.name], names[tensor.name].hf[0].format(i=index), values, None)
        return
    row = 0
    for part, shape in tensor.sources():
        rows, row = values[row : row + shape[0]], row + shape[0]
        _put(state, names[part], names[part].hf[0].format(i=index), rows, spec.layers[index].mixer)


def _put(state: State, source: Source, name: str, rows: Array, mixer: object) -> None:
    """Rows of the model into the hub's tensor, of which they may be a part."""
    if source.transform == "add_one":
        rows = rows - np.float32(1)
    if name.endswith(("conv1d.weight", "conv.conv.weight")):
        rows = rows[:, None]
    if name.endswith("A_log") and isinstance(mixer, ChannelDelta) and mixer.lower_bound is None:
        rows = rows[None, None, :, None]
    pick = source.pick if getattr(mixer, "output_gate", "") != "none" else None
    if pick is None:
        state[name] = np.ascontiguousarray(rows)
        return
    found = pick(mixer)
    if name not in state:
        state[name] = np.zeros((found.of, *rows.shape[1:]), np.float32)
    state[name][found.places] = rows


def _latent(layer: LayerWeights, names: Mapping[str, Source], index: int) -> State:
    """Keys and values of latents by head in one matrix, as the hub has them."""
    mixer = layer.layer.mixer
    if not isinstance(mixer, LatentAttention):
        return {}
    keys = _rows(layer.int8("attention.k_b"))[: mixer.heads * mixer.kv_rank]
    values = _rows(layer.int8("attention.v_b"))[: mixer.heads * mixer.value_dim]
    by_head = keys.reshape(mixer.heads, mixer.kv_rank, -1).swapaxes(1, 2)
    both = np.concatenate([by_head, values.reshape(mixer.heads, -1, mixer.kv_rank)], axis=1)
    name = names["attention.v_b"].hf[0].format(i=index)
    return {name: np.ascontiguousarray(both.reshape(-1, mixer.kv_rank))}


def _experts(weights: ModelWeights, layer: LayerWeights, names: Mapping[str, Source], index: int) -> State:
    mlp = layer.layer.experts
    if mlp is None:
        return {}
    state: State = {}
    fused: dict[str, list[Array]] = {"experts.gate_up": [], "experts.down": []}
    for number, record in enumerate(layer.records()):
        sizes = mlp.width(weights.spec.hidden), mlp.intermediate, mlp.gated
        parts = weights.expert_layout.unpack_expert(record, *sizes)
        if not mlp.gated:
            for part, values in zip(("up", "down"), parts[1:], strict=True):
                state[names[f"experts.{part}"].hf[0].format(i=index, e=number)] = values
            continue
        for part, values in zip(("gate", "up", "down"), parts, strict=True):
            state[names[f"experts.{part}"].hf[0].format(i=index, e=number)] = values
        both = _turns(*parts[:2]) if names["experts.gate_up"].interleaved else np.concatenate(parts[:2])
        fused["experts.gate_up"].append(both.T)
        fused["experts.down"].append(parts[2].T)
    if spec_fused := FUSED.get(weights.spec.family):
        return {
            name.format(i=index): np.ascontiguousarray(np.stack([matrix.T for matrix in fused[ours]]))
            for ours, name in spec_fused.items()
        }
    if mlp.gated and names["experts.down"].transposed:  # the hub has no others
        state = {
            names[name].hf[-1].format(i=index): np.ascontiguousarray(np.stack(values))
            for name, values in fused.items()
        }
    if mlp.bias:
        gate, up = (layer.vector(f"experts.{part}.bias") for part in ("gate", "up"))
        state[names["experts.gate.bias"].hf[0].format(i=index)] = _turns(gate.T, up.T).T.copy()
    return state


def _turns(gate: Array, up: Array) -> Array:
    """Rows of both, by turns."""
    return np.stack([gate, up], axis=1).reshape(-1, *gate.shape[1:])


def _rows(weight: Int8Weight) -> npt.NDArray[np.float32]:
    return Int8RowsLayout().unpack(weight.codes, weight.scales)


def write_checkpoint(state: State, config: Mapping[str, Any], folder: Path) -> Path:
    """A folder that transformers opens: config.json and model.safetensors in float32."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "dtype": "float32", "tie_word_embeddings": False})
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def transformers_logits(folder: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    """float32 logits [tokens, vocab] of transformers' model in a folder. Raises ValueError if a weight is
    missing or left over there."""
    import torch
    import transformers

    model_type = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    family = family_of_model_type(model_type)
    if family is None:
        raise ValueError(f"no such family: {model_type}")
    reference = getattr(transformers, family.reference)
    config = reference.config_class.from_pretrained(folder)
    config.model_type = reference.config_class.model_type  # by which tensors are found; another family's
    model, info = reference.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # The numbers of hashes it works out itself.
    needless = re.compile(r"model\.visual\.|.*\.ple_embedding\.(layer_multipliers|ngram_heads_\w+)$")
    info["missing_keys"] = {key for key in info["missing_keys"] if not needless.match(key)}
    wrong = {key: value for key, value in info.items() if value and key != "error_msgs"}
    if wrong:
        raise ValueError(f"the checkpoint is not the model's: {wrong}")
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model.eval()(torch.tensor([tokens])).logits[0].numpy()
    return logits
