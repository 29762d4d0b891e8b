"""Sparse attention: how a layer picks the keys that its queries see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from krasis.formats.models.record import MAX_HEAD_DIM, MAX_HEADS, MAX_POSITIONS, Record, size
from krasis.formats.models.rope import Rope

INDEX_NORM_EPS = 1e-6
"""Of the layer norm of keys of an index over tokens: no config says it."""


@dataclass(frozen=True, slots=True)
class Selection(Record):
    """An index that scores keys by small heads of its own; queries attend to the best ``budget`` tokens only.

    kind: ``tokens`` scores each key (DSA), ``pools`` learnt averages of ``block`` keys, of which it takes
    whole ones and the keys behind the last whole one, ``block_mean`` means of blocks and ``block_max`` the
    best key of each. key_heads: heads of the index's keys. reuses: no index of its own, the choice of the
    layer before that has one.
    """

    kind: Literal["tokens", "pools", "block_mean", "block_max"]
    heads: int = size(MAX_HEADS)
    dim: int = size(MAX_HEAD_DIM)
    budget: int = size(MAX_POSITIONS)
    block: int = size(MAX_POSITIONS, 1, 1)
    key_heads: int = size(MAX_HEADS, 1, 1)
    rope: Rope | None = None
    reuses: bool = False

    @property
    def most_keys(self) -> int:
        """Most tokens that a query attends to, with those behind the last whole block: so many are all."""
        return self.budget + self.block - 1

    @property
    def key_parts(self) -> tuple[int, ...]:
        """Channels that an index over tokens or pools keeps of each: its key, and of pools its gates."""
        return (self.dim, self.dim) if self.kind == "pools" else (self.dim,)
