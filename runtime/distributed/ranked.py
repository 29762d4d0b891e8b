"""What ranks need of the backend they run in step, beyond ``model.backend.Backend``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from krasis.runtime.backend import Backend, KvRows, Logits, TokenIds
from krasis.runtime.device.api import Stream


class RankedBackend(Backend, Protocol):
    """A backend that was opened with a ``Parallel`` of several ranks.

    compute_stream: of prefill. decodes_alone: decode needs no other rank (else it is a one-token prefill).
    """

    compute_stream: Stream
    decodes_alone: bool

    def prefers_alone(self, num_tokens: int, start: int) -> bool:
        """Whether rank 0 had better compute so few tokens without the others."""
        ...

    def decode(self, token: int, position: int) -> Logits:
        """Logits [vocab] of one token."""
        ...

    def export_kv(self, layer: int, num_tokens: int) -> tuple[KvRows, KvRows]:
        """See ``StateStore.export``."""
        ...

    def import_kv(self, layer: int, keys: KvRows, values: KvRows) -> None:
        """See ``StateStore.import_``."""
        ...

    def prefill(self, tokens: TokenIds, start: int, want_all: bool, alone: bool = False) -> Logits:
        """Logits [T or 1, vocab] of tokens at positions start.., of all or of the last; alone: without any
        collective. Other ranks than 0 give no logits, [0,
        vocab]."""
        ...

    def kv_layers(self) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [num_kv_heads, capacity, head_dim] of every layer, on the device."""
        ...
