"""One tensor of a bundle, before it has a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Store = Literal["int8_rows", "plain", "f32", "experts", "table", "ids"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's name, shape in elements (outputs first) and how it is stored.

    store: ``int8_rows`` (packed with a scale a row), ``plain`` (keeps its source's type), ``f32``,
    ``experts`` (in the experts' records: [experts, n, k], or [experts, n] for a bias), ``table`` (rows that
    are looked up, too large for memory) or ``ids`` (int32 numbers, no weights). parts: the source's tensors
    that are stacked by rows, if more than itself.
    """

    name: str
    shape: tuple[int, ...]
    store: Store
    parts: tuple[str, ...] = ()


class NormKind(Protocol):
    @property
    def hidden(self) -> int:
        """Features that are normed."""


def norm(name: str, spec: NormKind) -> Tensor:
    """The weight of a norm over the residual."""
    return Tensor(name, (spec.hidden,), "plain")
