"""What the engine asks of a machine that runs a model. A GPU backend is another file with this interface."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]


class Backend(Protocol):
    """One model with one KV cache. Positions are given by the caller; what lies behind a position is
    overwritten.

    description: one line for logs: the path chosen. prefill_chunk: most tokens of one ``prefill`` call.
    capacity: positions.
    """

    description: str
    prefill_chunk: int
    capacity: int

    def prefill(self, tokens: TokenIds, start: int, want_all: bool) -> Logits:
        """Computes tokens at positions start..; gives logits [T or 1, vocab] of all tokens or of the last
        one.

        The result may be a view that the next call overwrites.
        """
        ...

    def decode(self, token: int, position: int) -> Logits:
        """Computes one token; gives its logits [vocab], a view that the next call overwrites."""
        ...

    def close(self) -> None:
        """Frees threads and memory. Calling it again does nothing."""
        ...
