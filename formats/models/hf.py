"""Typed access to a Hugging Face ``config.json``, and the refusal of settings that are not understood."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.models.record import (
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    shown_number,
)
from krasis.formats.names import shown

REQUIRED: Any = object()
_LIMITS = {
    "vocab_size": MAX_VOCAB,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "head_dim": MAX_HEAD_DIM,
    "max_position_embeddings": MAX_POSITIONS,
    "num_experts": MAX_EXPERTS,
    "num_local_experts": MAX_EXPERTS,
    "n_routed_experts": MAX_EXPERTS,
    "num_experts_per_tok": MAX_EXPERTS,
    "sliding_window": MAX_POSITIONS,
    "original_max_position_embeddings": MAX_POSITIONS,
}


class Config:
    """A table of a ``config.json``. A field that is null counts as absent, as in transformers.

    where: the file and the table, for messages. Getters raise FormatError for what is missing, ill-typed or
    out of range. Where a field goes by several names, the first that is there counts.
    """

    __slots__ = ("table", "where")

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self.table, self.where = table, where

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.table.get(name) is not None

    def path(self, name: str) -> str:
        """A field as messages show it."""
        return f"{self.where}: {name}"

    def _value(self, names: Sequence[str], default: Any) -> tuple[str, Any]:
        for name in names:
            if self.has(name):
                return name, self.table[name]
        if default is REQUIRED:
            hint = "the file may be of another model"
            raise FormatError("field is missing", where=self.path(names[0]), hint=hint)
        return names[0], default

    def size(self, *names: str, default: Any = REQUIRED, least: int = 1, limit: int | None = None) -> int:
        """A whole number from ``least`` to ``limit`` (by default the limit of sizes of that name)."""
        name, value = self._value(names, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise FormatError("field must be an integer", where=self.path(name), got=shown(value))
        most = limit if limit is not None else _LIMITS.get(name, MAX_HIDDEN)
        if not least <= value <= most:
            got = shown_number(value)
            raise FormatError(
                "size is out of range", where=self.path(name), got=got, limit=f"{least}..{most}"
            )
        return value

    def optional_size(self, *names: str, limit: int | None = None) -> int | None:
        """``size``, or None where no such field is there or it is 0."""
        return self.size(*names, default=0, least=0, limit=limit) or None

    def number(self, *names: str, default: Any = REQUIRED) -> float:
        """A finite number."""
        name, value = self._value(names, default)
        return self._number(name, value)

    def _number(self, name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise FormatError("field must be a number", where=self.path(name), got=shown(value))
        if (isinstance(value, int) and value.bit_length() > 63) or not math.isfinite(value):
            raise FormatError("field must be a number", where=self.path(name), got=shown_number(value))
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false."""
        name, value = self._value(names, default)
        if not isinstance(value, bool):
            raise FormatError("field must be true or false", where=self.path(name), got=shown(value))
        return value

    def choice(self, name: str, choices: Mapping[str, Any], default: Any = REQUIRED) -> Any:
        """What ``choices`` has for a text field. Raises UnsupportedModelError for another text."""
        _, value = self._value((name,), default)
        if not isinstance(value, str) or value not in choices:
            raise self.unsupported(name, value, ", ".join(choices))
        return choices[value]

    def items(self, name: str, length: int) -> list[Any] | None:
        """The first ``length`` entries of a list (drafting layers may follow); None where it is absent."""
        if not self.has(name):
            return None
        value = self.table[name]
        if not isinstance(value, list) or not length <= len(value) <= MAX_LAYERS + 64:
            got = len(value) if isinstance(value, list) else shown(value)
            limit = f"a list of {length}"
            raise FormatError("not one entry a layer", where=self.path(name), got=got, limit=limit)
        return value[:length]

    def sizes(self, name: str, length: int, default: int) -> list[int]:
        """One size a layer, from a list or a single number."""
        if not isinstance(self.table.get(name), list):
            return [self.size(name, default=default)] * length
        entries = self.items(name, length) or []
        return [Config({name: entry}, f"{self.where}[{i}]").size(name) for i, entry in enumerate(entries)]

    def numbers(self, name: str, length: int, default: float) -> list[float]:
        """One number a layer; null entries and an absent list give the default."""
        entries = self.items(name, length) or [None] * length
        return [default if entry is None else self._number(name, entry) for entry in entries]

    def kinds(self, name: str, length: int, known: Mapping[str, Any], default: Sequence[str]) -> list[Any]:
        """What ``known`` has for each entry of a list of texts. Raises UnsupportedModelError for others."""
        entries = self.items(name, length) if self.has(name) else default
        for entry in entries or ():
            if not isinstance(entry, str) or entry not in known:
                raise self.unsupported(name, entry, ", ".join(known))
        return [known[entry] for entry in entries or ()]

    def child(self, name: str) -> Config:
        """A table inside; empty where it is absent."""
        value = self.table.get(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise FormatError("field must be an object", where=self.path(name), got=shown(value))
        return Config(value, self.path(name))

    def expect(self, name: str, *allowed: Any, limit: str = "") -> None:
        """Raises UnsupportedModelError unless the field is absent or one of ``allowed``."""
        value = self.table.get(name)
        if value is None or any(value == good and type(value) is type(good) for good in allowed):
            return
        raise self.unsupported(name, value, limit or ", ".join(str(good) for good in allowed))

    def unsupported(self, name: str, got: object, limit: object) -> UnsupportedModelError:
        """The error for a sound setting that changes what the model computes in a way not known here."""
        return UnsupportedModelError(
            "this feature is not supported", where=self.path(name), got=shown(got), limit=limit
        )
