"""What ranks need of the backend they run in step, beyond ``runtime.backend.Backend``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from krasis.runtime.backend import Backend
from krasis.runtime.batch import Batch, Logits, StateStore
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.parallel_decode import RankLink
from krasis.runtime.gpu.parallel_follower import RankFollower


class RankedState(StateStore, Protocol):
    """The state of a backend that other ranks follow, or that follows rank 0."""

    def begin(self, batch: Batch) -> None:
        """What lies beyond the spans' starts is no longer held. Raises NativeError, and changes nothing, for
        spans that do not begin where their slots have been computed."""
        ...

    def continue_at(self, slot: int, position: int) -> None:
        """Rank 0 says so: the slot is open and ends there."""
        ...


class RankedBackend(Backend, Protocol):
    """A backend that was opened with a ``Parallel`` of several ranks. compute_stream: of prefill."""

    compute_stream: Stream

    @property
    def state(self) -> RankedState:
        """See ``Backend``."""
        ...

    @property
    def decode_ranks(self) -> RankLink | RankFollower | None:
        """This rank's part in decode by several; None if rank 0 decodes alone."""
        ...

    @property
    def idle_memory(self) -> torch.Tensor | None:
        """Bytes on the device that may be overwritten between passes, as many on every rank; None: there are
        none."""
        ...

    def runs_alone(self, batch: Batch) -> bool:
        """Whether rank 0 had better compute the batch without the others."""
        ...

    def run(self, batch: Batch, alone: bool = False) -> Logits:
        """See ``Backend``. alone: without any collective. Other ranks than 0 give no logits, [0, vocab].
        Raises OutOfDeviceMemoryError when it has taken part in all that ranks exchange in the pass."""
        ...

    def shrink(self, words: str) -> None:
        """On all ranks at once, after one of them ran out of memory, which ``words`` says: half of
        ``prefill_chunk``. Raises ResourceError if that was one token."""
        ...

    def state_layers(self, slot: int) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """What each layer of a slot overwrites with every token, in two halves [1, n, 1], on the device."""
        ...

    def kv_layers(self, slot: int) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [num_kv_heads, capacity, head_dim] of every layer of a slot, on the device."""
        ...
