"""Copies of what each token overwrites, behind each token of a pass that may have gone too far."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Trail:
    """copies: of the fixed bytes of a slot; the first ``num`` are those of the positions from ``first`` on,
    once the pass is done. Their memory is kept for the next pass."""

    copies: list[Bytes] = field(default_factory=list)
    first: int = 0
    num: int = 0

    def at(self, position: int) -> Bytes | None:
        """The copy of a position, if there is one."""
        number = position - self.first
        return self.copies[number] if 0 <= number < self.num else None

    def make(self, count: int, num_bytes: int) -> list[Bytes]:
        """Room for so many copies, which are those of no position yet."""
        self.num = 0
        while len(self.copies) < count:
            self.copies.append(np.empty(num_bytes, np.uint8))
        return self.copies[:count]
