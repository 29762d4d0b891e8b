"""Reads the metadata of a GGUF file into our architecture record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from krasis.formats.architecture_record import Architecture, RopeScaling, check_architecture
from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.names import shown

# GGUF's name of an architecture -> model_type of Hugging Face
SUPPORTED_GGUF_ARCHITECTURES = {"qwen3moe": "qwen3_moe"}
EMBEDDING_TENSOR = "token_embd.weight"
OUTPUT_TENSOR = "output.weight"

_SILENT_DEFAULTS: tuple[tuple[str, Any], ...] = (
    ("expert_weights_scale", 1.0),
    ("attention.sliding_window", 0),
    ("leading_dense_block_count", 0),
    ("expert_shared_count", 0),
    ("expert_group_count", 0),
)


class SizedTensor(Protocol):
    """What has to be known of a tensor here."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major sizes, e.g. [vocab, hidden]."""


def from_gguf_metadata(
    metadata: Mapping[str, Any], tensors: Mapping[str, SizedTensor], where: str = "GGUF metadata"
) -> Architecture:
    """The architecture that a GGUF's metadata describes. tensors: all of the model's (they tell vocabulary
    and tying).

    Raises UnsupportedModelError for another architecture or a feature the runtime lacks, FormatError for
    missing, ill-typed or impossible values.
    """
    name = metadata.get("general.architecture")
    if name not in SUPPORTED_GGUF_ARCHITECTURES:
        raise UnsupportedModelError(
            "this model architecture is not supported",
            where=f"{where}: general.architecture",
            got=shown(name),
            limit="supported architectures: " + ", ".join(SUPPORTED_GGUF_ARCHITECTURES),
        )
    keys = _Keys(metadata, f"{name}.", where)
    for key, default in _SILENT_DEFAULTS:
        if (value := metadata.get(f"{name}.{key}", default)) != default:
            raise UnsupportedModelError(
                "this feature is not supported",
                where=f"{where}: {name}.{key}",
                got=shown(value),
                limit=default,
            )
    num_heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", default=hidden_size // max(num_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := keys.integer(key, default=head_dim)) != head_dim:
            raise UnsupportedModelError(
                "differs from the size of attention's keys",
                where=f"{where}: {name}.{key}",
                got=other,
                limit=head_dim,
            )
    max_positions = keys.integer("context_length")
    architecture = Architecture(
        model_type=SUPPORTED_GGUF_ARCHITECTURES[str(name)],
        num_layers=keys.integer("block_count"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        num_experts=keys.integer("expert_count"),
        num_experts_per_token=keys.integer("expert_used_count"),
        expert_intermediate_size=keys.integer("expert_feed_forward_length"),
        vocab_size=_vocab_size(tensors, hidden_size, where),
        max_positions=max_positions,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", default=10_000.0),
        rope_scaling=_read_scaling(keys, max_positions),
        # Every program that runs qwen3moe GGUFs renormalises; the key is newer than most files.
        norm_topk_prob=keys.boolean("expert_weights_norm", default=True),
        tie_word_embeddings=OUTPUT_TENSOR not in tensors,
    )
    check_architecture(architecture, where)
    return architecture


def _vocab_size(tensors: Mapping[str, SizedTensor], hidden_size: int, where: str) -> int:
    embedding = tensors.get(EMBEDDING_TENSOR)
    if embedding is None:
        raise FormatError(
            "tensor is missing", where=f"{where}: {EMBEDDING_TENSOR}", hint="is a part of the model missing?"
        )
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden_size:
        raise FormatError(
            "tensor has the wrong shape",
            where=f"{where}: {EMBEDDING_TENSOR}",
            got=list(embedding.shape),
            limit=f"[vocab, {hidden_size}]",
        )
    return embedding.shape[0]


def _read_scaling(keys: _Keys, max_positions: int) -> RopeScaling:
    """As llama.cpp's loader of qwen3moe has it: without a type a factor is linear, its old name is
    ``rope.scale_linear``, 0 is none; of YaRN only the original length and ``attn_factor`` can be set.
    """
    kind = keys.text("rope.scaling.type", default="linear")
    old_factor = keys.number("rope.scale_linear", default=0.0)
    factor = keys.number("rope.scaling.factor", default=old_factor) or 1.0
    multiplier = keys.number("rope.scaling.attn_factor", default=1.0)
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            "this kind of rope scaling is not supported",
            where=keys.path("rope.scaling.type"),
            got=shown(kind),
            limit="none, linear, yarn",
        )
    if kind != "yarn":
        if multiplier != 1.0:  # llama.cpp scales sine and cosine by it; nothing in a bundle could say so
            raise UnsupportedModelError(
                "an attention factor without YaRN is not supported",
                where=keys.path("rope.scaling.attn_factor"),
                got=multiplier,
                limit=1.0,
            )
        return RopeScaling() if kind == "none" or factor == 1.0 else RopeScaling(kind="linear", factor=factor)
    # The file's factor multiplies YaRN's own 0.1 ln(factor) + 1, which ours replaces.
    attention_factor = None if multiplier == 1.0 else multiplier * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    original = keys.integer("rope.scaling.original_context_length", default=max_positions)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=original or max_positions,
        attention_factor=attention_factor,
    )


class _Keys:
    """Typed access to the keys below one prefix."""

    __slots__ = ("_metadata", "_prefix", "_where")

    def __init__(self, metadata: Mapping[str, Any], prefix: str, where: str) -> None:
        self._metadata, self._prefix, self._where = metadata, prefix, where

    def path(self, key: str) -> str:
        """The key as messages show it."""
        return f"{self._where}: {self._prefix}{key}"

    def _value(self, key: str, default: Any) -> Any:
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise FormatError(
                "metadata key is missing", where=self.path(key), hint="the file may be incomplete"
            )
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise FormatError("metadata must be an integer", where=self.path(key), got=shown(value))
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise FormatError("metadata must be a finite number", where=self.path(key), got=shown(value))
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise FormatError("metadata must be true or false", where=self.path(key), got=shown(value))
        return value

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise FormatError("metadata must be text", where=self.path(key), got=shown(value))
        return value
