"""One tensor of a bundle, before it has a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Store = Literal["int8_rows", "plain", "f32", "experts", "table", "ids"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's name, shape in elements (outputs first) and how it is stored.

    store: ``int8_rows`` (packed with a scale a row), ``plain`` (keeps its source's type), ``f32``,
    ``experts`` (in the experts' records: [experts, n, k]), ``table`` (rows that are looked up, too large for
    memory) or ``ids`` (int32 numbers, no weights). parts: the source's tensors that are stacked by rows, if
    more than itself; part_rows: the rows of each, where they are not equal. per_expert: a row an expert, of
    which a token meets those of its own.
    """

    name: str
    shape: tuple[int, ...]
    store: Store
    parts: tuple[str, ...] = ()
    part_rows: tuple[int, ...] = ()
    per_expert: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether it is a blob of its own, or two (codes and scales)."""
        return self.store not in ("experts", "table")

    @property
    def is_bias(self) -> bool:
        """Whether it is added to something: zeros are what it often is."""
        return self.name.endswith("bias")

    def sources(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape of each of the source's tensors that make up a dense one, in their order."""
        if not self.parts:
            return ((self.name, self.shape),)
        rows = self.part_rows or (self.shape[0] // len(self.parts),) * len(self.parts)
        return tuple((part, (n, *self.shape[1:])) for part, n in zip(self.parts, rows, strict=True))


class NormKind(Protocol):
    @property
    def hidden(self) -> int:
        """Features that are normed."""


def norm(name: str, spec: NormKind) -> Tensor:
    """The weight of a norm over the residual."""
    return Tensor(name, (spec.hidden,), "plain")
