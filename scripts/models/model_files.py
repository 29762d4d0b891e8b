"""Checkpoints on disk, as released on the Hugging Face hub: shape, config, safetensors.

Shared by the scripts that make models. BF16 values travel as uint16 bit patterns, because NumPy
has no bfloat16.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from scripts.models.family_shapes import FamilyShape, hub_tensors, spec_of_config

BF16_BYTES = 2
INDEX_NAME = "model.safetensors.index.json"

Bf16Bits = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """Sizes of a Qwen3-MoE model; names follow Hugging Face's config."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    tie_word_embeddings: bool
    rms_norm_eps: float = 1e-6
    yarn_factor: float | None = None
    yarn_original_positions: int = 32768

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that no Qwen3-MoE model can have."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads do not share {self.num_key_value_heads} kv heads"
            )
        if not 0 < self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"top {self.num_experts_per_tok} of {self.num_experts} experts")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")


Shape = MoeShape | FamilyShape
TINY_SHAPE = MoeShape(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    intermediate_size=256,
    max_position_embeddings=2048,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
    yarn_original_positions=2048,
)


def hub_config(shape: Shape, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    """config.json in the form of the released checkpoints.

    transformers 5 itself writes other keys (`num_local_experts`, `rope_parameters`, `dtype`), which
    differ by version, and reads this form too.
    """
    if isinstance(shape, FamilyShape):
        return {**shape.config, "eos_token_id": eos, "pad_token_id": pad}
    scaling: dict[str, Any] | None = None
    if shape.yarn_factor is not None:
        scaling = {
            "rope_type": "yarn",
            "factor": shape.yarn_factor,
            "original_max_position_embeddings": shape.yarn_original_positions,
        }
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "eos_token_id": eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "max_window_layers": shape.num_hidden_layers,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": shape.moe_intermediate_size,
        "norm_topk_prob": True,
        "num_attention_heads": shape.num_attention_heads,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "output_router_logits": False,
        "pad_token_id": pad,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": scaling,
        "rope_theta": shape.rope_theta,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, hub names, in layer order. Matrices are [out, in]."""
    return dict(hub_tensors(spec_of_config(hub_config(shape))))


def num_values(dims: tuple[int, ...]) -> int:
    """How many values a tensor of these dimensions holds."""
    count = 1
    for dim in dims:
        count *= dim
    return count


def to_bf16(values: Floats) -> Bf16Bits:
    """Round finite float32 to BF16 bits, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    return (rounded >> 16).astype(np.uint16)


def from_bf16(bits: Bf16Bits) -> Floats:
    """BF16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], max_shard_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Deal tensors out in order; a shard ends before it would outgrow `max_shard_bytes`."""
    shards: list[dict[str, tuple[int, ...]]] = []
    used = 0
    for name, dims in shapes.items():
        size = num_values(dims) * BF16_BYTES
        if not shards or used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = dims
        used += size
    return shards


class ShardWriter:
    """One BF16 safetensors file: header first, then the tensors' bytes, streamed in order."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dims in shapes.items():
            begin, end = end, end + num_values(dims) * BF16_BYTES
            header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._expected_bytes = end
        self._written_bytes = 0
        self._path = path
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(raw)) + raw)

    def write(self, bits: Bf16Bits) -> None:
        """Append the next piece of the data section."""
        self._file.write(np.ascontiguousarray(bits).data)
        self._written_bytes += bits.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._written_bytes != self._expected_bytes:
            raise ValueError(
                f"{self._path}: {self._written_bytes} bytes written, header promises {self._expected_bytes}"
            )


def write_checkpoint(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Iterable[Bf16Bits],
    max_shard_bytes: int,
) -> int:
    """Write all shards and the index; return the bytes of tensor data.

    `pieces` yields every tensor's bits in the order of `shapes`, a tensor in one piece or several,
    no piece spanning two tensors. Raises ValueError when they do not add up.
    """
    shards = plan_shards(shapes, max_shard_bytes)
    stream = iter(pieces)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        with ShardWriter(folder / file, shard) as writer:
            for name, dims in shard.items():
                missing = num_values(dims)
                while missing > 0:
                    piece = next(stream, None)
                    if piece is None or piece.size > missing:
                        raise ValueError(f"{name}: the pieces given do not make {dims}")
                    writer.write(piece)
                    missing -= piece.size
    total = sum(num_values(dims) for dims in shapes.values()) * BF16_BYTES
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


class Checkpoint:
    """A BF16 checkpoint of our own making, mapped for reading."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        index = json.loads((folder / INDEX_NAME).read_text("utf-8"))
        self._weight_map: dict[str, str] = index["weight_map"]
        self._open: dict[str, tuple[Any, dict[str, Any]]] = {}

    def names(self) -> Iterator[str]:
        """All tensor names."""
        yield from self._weight_map

    def tensor(self, name: str) -> Bf16Bits:
        """A read-only view of one tensor's bits, shaped. Raises KeyError or ValueError."""
        file = self._weight_map[name]
        if file not in self._open:
            self._open[file] = self._map(self.folder / file)
        data, header = self._open[file]
        entry = header[name]
        if entry["dtype"] != "BF16":
            raise ValueError(f"{file}: {name} is {entry['dtype']}, only BF16 is read here")
        begin, end = entry["data_offsets"]
        bits: Bf16Bits = data[begin:end].view(np.uint16).reshape(entry["shape"])
        return bits

    @staticmethod
    def _map(path: Path) -> tuple[Any, dict[str, Any]]:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        return np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length), header
