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
    from krasis.runtime.gpu.blocks.gated_delta import GpuGatedDelta
    from krasis.runtime.gpu.blocks.latent import GpuLatentAttention


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

    def apply_delta(self, block: GpuGatedDelta, gates: torch.Tensor, out: torch.Tensor) -> None:
        """out [T, value_heads * value_dim] = the gated delta rule of ``own.x`` and gates [T, b a], each row
        after those of its own sequence; gates are overwritten."""
        ...

    def attend_latent(
        self, block: GpuLatentAttention, q: torch.Tensor, kv: torch.Tensor, attended: torch.Tensor
    ) -> None:
        """attended [T, heads * value_dim] = latent attention of q, each row in its own sequence, whose
        latents kv, float32, are stored first."""
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


def packed(buffer: torch.Tensor, columns: int, after: int = 0) -> torch.Tensor:
    """[T, columns] without gaps in the memory of a buffer [T, as many columns or more]. after: columns of
    another such matrix, which lies before it."""
    num_rows = buffer.shape[0]
    if buffer.shape[1] == columns:
        return buffer
    return buffer.flatten()[num_rows * after : num_rows * (after + columns)].view(num_rows, columns)
