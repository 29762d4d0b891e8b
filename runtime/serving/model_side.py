"""What the core asks of a backend and of a model, and what can be chosen about the core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from krasis.formats.errors import UsageError
from krasis.runtime.backend import LayerProgress
from krasis.runtime.batch import Batch, Logits, StateStore
from krasis.runtime.serving.api import Request
from krasis.runtime.serving.steps import Limits
from krasis.runtime.text.ends import TextEnds


class BatchBackend(Protocol):
    """What the core asks of a backend; see ``backend.Backend``."""

    description: str
    prefill_chunk: int
    capacity: int
    kv_dtype: str
    layer_done: LayerProgress | None

    @property
    def state(self) -> StateStore:
        """What is kept of its sequences."""
        ...

    def run(self, batch: Batch) -> Logits:
        """f32 [batch.num_logits, vocab], a view that the next call overwrites."""
        ...

    def close(self) -> None:
        """Frees threads and memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """num_slots: sequences at once, no more than the backend has. max_waiting: requests that may wait for a
    slot. cache_bytes: RAM for prefixes beside the slots. limits: None = the scheduler's usual ones.
    """

    num_slots: int = 4
    max_waiting: int = 64
    cache_bytes: int = 0
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if self.num_slots < 1 or self.max_waiting < 1 or self.cache_bytes < 0:
            raise UsageError("a core's settings make no sense", got=self)


@dataclass(frozen=True, slots=True)
class ModelSide:
    """What the core must know of a model.

    num_layers: of its state. ends: where the text after a request's prompt ends, and what in it is thinking;
    raises UsageError for stops that cannot be met.
    """

    vocab_size: int
    num_layers: int
    ends: Callable[[Request], TextEnds]
