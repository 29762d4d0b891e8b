"""What a copy of a sequence's state has: the bytes that each token overwrites, and the ends of windows."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.runtime.batch import StateRows
from krasis.runtime.state.kv_store import Bytes


@dataclass(slots=True)
class Window:
    """Of a layer with a window the positions first.. before a copy's: keys and values [kv_heads, n, width],
    of which the first num_saved are here; the others are in the ring still."""

    first: int
    keys: StateRows
    values: StateRows
    num_saved: int = 0

    @property
    def end(self) -> int:
        """The copy's position."""
        return self.first + int(self.keys.shape[1])


@dataclass(slots=True)
class Copy:
    """What a sequence overwrites later: fixed bytes, and what of windows is overwritten, when it is. lowest:
    the first position that it can be gone back to with it. due: the end of a pass from which on something is
    overwritten that is not here.
    """

    fixed: Bytes
    windows: dict[int, Window]
    lowest: int
    due: int = 0
