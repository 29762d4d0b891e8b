"""Typed access to GGUF metadata, and what the families' readers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.models.record import (
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_POSITIONS,
    located,
    shown_number,
)
from krasis.formats.models.rope import Rope, RopeScaling
from krasis.formats.names import shown

EMBEDDING_TENSOR = "token_embd.weight"
OUTPUT_TENSOR = "output.weight"
_LIMITS = {
    "block_count": MAX_LAYERS,
    "context_length": MAX_POSITIONS,
    "attention.head_count": MAX_HEADS,
    "attention.head_count_kv": MAX_HEADS,
    "attention.key_length": MAX_HEAD_DIM,
    "attention.indexer.head_count": MAX_HEADS,
    "attention.indexer.key_length": MAX_HEAD_DIM,
    "attention.indexer.top_k": MAX_POSITIONS,
    "attention.value_length": MAX_HEAD_DIM,
    "rope.scaling.original_context_length": MAX_POSITIONS,
    "expert_count": MAX_EXPERTS,
    "expert_used_count": MAX_EXPERTS,
}


class SizedTensor(Protocol):
    """What has to be known of a tensor here."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major sizes, e.g. [vocab, hidden]."""


class Keys:
    """The metadata below an architecture's prefix, and the shapes of the tensors.

    Getters raise FormatError for what is missing, ill-typed or out of range.
    """

    __slots__ = ("_metadata", "_prefix", "_where", "tensors")

    def __init__(
        self, metadata: Mapping[str, Any], name: str, tensors: Mapping[str, SizedTensor], where: str
    ) -> None:
        self._metadata, self._prefix, self._where, self.tensors = metadata, f"{name}.", where, tensors

    @property
    def where(self) -> str:
        """The file, for messages."""
        return self._where

    def path(self, key: str) -> str:
        """The key as messages show it."""
        return f"{self._where}: {self._prefix}{key}"

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return self._prefix + key in self._metadata

    def _value(self, key: str, default: Any) -> Any:
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise FormatError(
                "metadata key is missing", where=self.path(key), hint="the file may be incomplete"
            )
        return value

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from ``least`` to the limit of such sizes."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise FormatError("metadata must be an integer", where=self.path(key), got=shown(value))
        limit = _LIMITS.get(key, MAX_HIDDEN)
        if not least <= value <= limit:
            got = shown_number(value)
            raise FormatError(
                "size is out of range", where=self.path(key), got=got, limit=f"{least}..{limit}"
            )
        return value

    def by_layer(self, key: str, count: int, kind: type) -> list[Any]:
        """A value of that type a layer, of an array, or of one value for all."""
        value = self._value(key, None)
        values = [value] * count if isinstance(value, kind) else value
        if not isinstance(values, list | tuple) or not all(type(one) is kind for one in values):
            raise FormatError(
                f"metadata must be an array of {kind.__name__}", where=self.path(key), got=shown(value)
            )
        if len(values) < count:
            raise FormatError("a value a layer is needed", where=self.path(key), got=len(values), limit=count)
        return list(values[:count])

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise FormatError("metadata must be a finite number", where=self.path(key), got=shown(value))
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise FormatError("metadata must be true or false", where=self.path(key), got=shown(value))
        return value

    def flags(self, key: str, count: int) -> tuple[bool, ...] | None:
        """One truth value for each of count blocks; None where the key is absent."""
        if not self.has(key):
            return None
        values = self._metadata[self._prefix + key]
        if not isinstance(values, list) or len(values) != count or not all(type(v) is bool for v in values):
            limit = f"{count} values, true or false"
            raise FormatError("metadata must say it for each block", where=self.path(key), limit=limit)
        return tuple(values)

    def text(self, key: str, default: str) -> str:
        """A text."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise FormatError("metadata must be text", where=self.path(key), got=shown(value))
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """Raises UnsupportedModelError unless the key is absent or one of ``allowed``."""
        if not self.has(key):
            return
        value = self._metadata[self._prefix + key]
        if not any(value == good for good in allowed):
            raise UnsupportedModelError(
                "this feature is not supported", where=self.path(key), got=shown(value), limit=allowed[0]
            )

    def expect_layers(self, key: str, count: int, number: float) -> None:
        """Raises UnsupportedModelError unless that number stands for each of the first count layers."""
        for got in self.by_layer(key, count, float):
            if got != number:
                raise UnsupportedModelError(
                    "layers that differ here are not supported", where=self.path(key), got=got, limit=number
                )

    def vocab(self, hidden: int) -> int:
        """The number of rows of the embedding. Raises FormatError without one [vocab, hidden]."""
        where = f"{self._where}: {EMBEDDING_TENSOR}"
        embedding = self.tensors.get(EMBEDDING_TENSOR)
        if embedding is None:
            raise FormatError("tensor is missing", where=where, hint="is a part of the model missing?")
        if len(embedding.shape) != 2 or embedding.shape[1] != hidden:
            got, limit = list(embedding.shape), f"[vocab, {hidden}]"
            raise FormatError("tensor has the wrong shape", where=where, got=got, limit=limit)
        return embedding.shape[0]

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return OUTPUT_TENSOR not in self.tensors

    def rope(self, dims: int, style: Literal["half", "interleaved"] = "half") -> Rope:
        """The rotary embedding of so many channels."""
        theta = self.number("rope.freq_base", default=10_000.0)
        with located(self.path("rope")):
            return Rope(dims, theta, style, "first", self._scaling())

    def _scaling(self) -> RopeScaling:
        """As llama.cpp's loader has it: without a type a factor is linear, its old name is
        ``rope.scale_linear``, 0 is none; of YaRN only the original length and ``attn_factor`` can be set.
        """
        kind = self.text("rope.scaling.type", default="linear")
        old_factor = self.number("rope.scale_linear", default=0.0)
        factor = self.number("rope.scaling.factor", default=old_factor) or 1.0
        multiplier = self.number("rope.scaling.attn_factor", default=1.0)
        if kind not in ("none", "linear", "yarn"):
            raise UnsupportedModelError(
                "this kind of rope scaling is not supported",
                where=self.path("rope.scaling.type"),
                got=shown(kind),
                limit="none, linear, yarn",
            )
        if kind != "yarn":
            if multiplier != 1.0:  # llama.cpp scales sine and cosine by it; nothing in a bundle could say so
                raise UnsupportedModelError(
                    "an attention factor without YaRN is not supported",
                    where=self.path("rope.scaling.attn_factor"),
                    got=multiplier,
                    limit=1.0,
                )
            return RopeScaling() if kind == "none" or factor == 1.0 else RopeScaling("linear", factor)
        # The file's factor multiplies YaRN's own 0.1 ln(factor) + 1, which ours replaces.
        own = 0.1 * math.log(max(factor, 1.0)) + 1.0
        context = self.size("context_length")
        original = self.size("rope.scaling.original_context_length", default=context, least=0)
        return RopeScaling(
            "yarn", factor, original or context, None if multiplier == 1.0 else multiplier * own
        )
