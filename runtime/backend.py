"""What the engine asks of a machine that runs a model. A GPU backend is another file with this interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]
KvRows = npt.NDArray[Any]
LayerProgress = Callable[[int, int], None]


class Backend(Protocol):
    """One model with one KV cache. Positions are given by the caller; what lies behind a position is
    overwritten.

    description: one line for logs: the path chosen. prefill_chunk: most tokens of one ``prefill`` call.
    capacity: positions. kv_dtype: what keys and values are kept in, ``f16``, ``bf16`` or ``f32``. placement:
    where the last prefill ran (before the first: where most will) and where decode runs, a few words each.
    layer_done: if set, called during ``prefill`` with how many layers of how many are done.
    """

    description: str
    prefill_chunk: int
    capacity: int
    kv_dtype: str
    layer_done: LayerProgress | None

    @property
    def placement(self) -> tuple[str, str]:
        """Where the last prefill ran (before the first: where most will) and where decode runs: a few words
        each.
        """
        ...

    def prefill(self, tokens: TokenIds, start: int, want_all: bool) -> Logits:
        """Computes tokens at positions start..; gives logits [T or 1, vocab] of all tokens or of the last
        one.

        The result may be a view that the next call overwrites.
        """
        ...

    def decode(self, token: int, position: int) -> Logits:
        """Computes one token; gives its logits [vocab], a view that the next call overwrites."""
        ...

    def export_kv(self, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """Keys and values of a layer's positions 0..num_tokens-1, each C-contiguous [num_kv_heads,
        num_tokens, head_dim] of kv_dtype (bf16 as uint16 bits).

        Both may be buffers that the next call overwrites.
        """
        ...

    def import_kv(self, layer: int, keys: KvRows, values: KvRows) -> None:
        """Writes a layer's positions from 0 on; arrays as ``export_kv`` gives them, of at most ``capacity``
        tokens.

        The caller may overwrite the arrays as soon as this returns.
        """
        ...

    def close(self) -> None:
        """Frees threads and memory. Calling it again does nothing."""
        ...
