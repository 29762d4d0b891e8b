"""What blocks ask of the pass that they work in: prefill's rows and decode's differ in how products are made,
where keys and values lie, and who computes the experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.weights import GpuInt8

if TYPE_CHECKING:
    from krasis.runtime.gpu.blocks.attention import GpuAttention
    from krasis.runtime.gpu.blocks.experts import GpuExperts


class PassRows(Protocol):
    """The rows of one pass."""

    @property
    def stream(self) -> Stream:
        """The stream of its launches."""
        ...

    @property
    def own(self) -> Buffers:
        """Buffers, cut to this rank's own rows."""
        ...

    @property
    def takes_x(self) -> bool:
        """Whether the routed experts read ``own.x``."""
        ...

    def product(
        self, x: torch.Tensor, weight: GpuInt8, out: torch.Tensor, residual: torch.Tensor | None = None
    ) -> None:
        """out [T, n] = (residual +) x [T, k] x W^T."""
        ...

    def small_product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """out f32 [T, n] = x f32 [T, k] x weight [n, k]^T in f32: routers and gates."""
        ...

    def attend(self, block: GpuAttention, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        """attended [T, attention_size] = attention of qkv [T, qkv_size], each row in its own sequence, whose
        keys and values are stored first."""
        ...

    def route(self, block: GpuExperts) -> None:
        """``own.ids`` and ``own.weights`` from ``own.router_logits``. What waits for the choice elsewhere is
        told of it."""
        ...

    def run_experts(self, block: GpuExperts) -> None:
        """hidden += the routed experts of ``own.normed`` or ``own.x``, wherever they are."""
        ...


class Block(Protocol):
    """A part of a layer."""

    def run(self, rows: PassRows) -> None:
        """hidden += block(norm(hidden))."""
        ...


def packed(buffer: torch.Tensor, columns: int) -> torch.Tensor:
    """[T, columns] without gaps in the memory of a buffer [T, as many columns or more]."""
    num_rows = buffer.shape[0]
    if buffer.shape[1] == columns:
        return buffer
    return buffer.flatten()[: num_rows * columns].view(num_rows, columns)
