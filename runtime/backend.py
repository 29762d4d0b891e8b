"""What the engine asks of a machine that runs a model. A GPU backend is another file with this interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from krasis.formats.models.spec import ModelSpec
from krasis.runtime.batch import Batch, Logits, StateRows, StateStore, TokenIds

__all__ = ["Backend", "KvRows", "LayerProgress", "Logits", "TokenIds"]

KvRows = StateRows
LayerProgress = Callable[[int, int], None]


class Backend(Protocol):
    """One model and the state of some sequences of it.

    description: one line for logs: the path chosen. prefill_chunk: most rows of one batch. capacity:
    positions of a sequence. kv_dtype: what keys and values are kept in, ``f16``, ``bf16``, ``f32`` or
    ``int8``. layer_done: if set, called during ``run`` with how many layers of how many are done. spec: the
    model.
    """

    description: str
    prefill_chunk: int
    capacity: int
    kv_dtype: str
    layer_done: LayerProgress | None
    spec: ModelSpec

    @property
    def state(self) -> StateStore:
        """What is kept of the sequences. A batch may use its open slots alone."""
        ...

    @property
    def placement(self) -> tuple[str, str]:
        """Where the last prefill ran (before the first: where most will) and where decode runs: a few words
        each.
        """
        ...

    def run(self, batch: Batch) -> Logits:
        """Computes the batch; gives the wanted logits, f32 [batch.num_logits, vocab] in the order of rows.

        A span's state beyond its start is overwritten. The result may be a view that the next call
        overwrites.
        """
        ...

    def close(self) -> None:
        """Frees threads and memory. Calling it again does nothing."""
        ...
