"""What blocks ask of the pass that they work in: prefill's rows and decode's differ in how products are made,
where keys and values lie, and who computes the experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.buffers import Buffers
from krasis.runtime.gpu.weights import GpuInt8

if TYPE_CHECKING:
    from krasis.runtime.gpu.blocks.attention import GpuAttention
    from krasis.runtime.gpu.blocks.experts import GpuExperts
    from krasis.runtime.gpu.blocks.latent import GpuLatentAttention
    from krasis.runtime.gpu.blocks.latent_rows import LatentRows
    from krasis.runtime.gpu.kernels.gated_delta import DeltaPlace, DeltaRows


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

    def normed_product(self, norm: torch.Tensor, eps: float, weight: GpuInt8, out: torch.Tensor) -> None:
        """out [T, n] = norm(``own.hidden``), 16 bits, x W^T. ``own.x`` may hold the norm afterwards."""
        ...

    def choose(self, block: GpuExperts) -> bool:
        """Whether it was all done at once: ``own.normed``, ``own.x`` and ``own.router_logits`` of a block
        whose router takes the norm itself, and ``route``."""
        ...

    def x_is_ready(self) -> None:
        """``own.x`` is what the routed experts take, until they have run: it may be sent to other ranks."""
        ...

    def small_product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """out f32 [T, n] = x f32 [T, k] x weight [n, k]^T in f32: routers and gates."""
        ...

    def attend(self, block: GpuAttention, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        """attended [T, attention_size] = attention of qkv [T, qkv_size], each row in its own sequence, whose
        keys and values are stored first."""
        ...

    def apply_state(self, block: StateBlock, gates: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """out [T, num_out] = what the block makes of ``own.x`` and gates, each row after those of its own
        sequence; gates are overwritten."""
        ...

    def table_parts(self, layer: int) -> Iterable[tuple[int, int, DeltaPlace | DeltaRows]]:
        """Own rows [first, last) that go through a layer's hashed table at once, few enough for its buffers,
        and where it keeps what it does of their sequences, in place of a convolution's columns. What a part
        leaves there must be there when the next is asked for."""
        ...

    def attend_latent(self, block: GpuLatentAttention, rows: LatentRows, attended: torch.Tensor) -> None:
        """attended [T, heads * value_dim] = latent attention of rows, each in its own sequence, whose latents
        are stored first."""
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


class StateBlock(Protocol):
    """A block through whose state the rows of a sequence go one after another. layer: its number. projection:
    of ``own.x``. gates: columns of each of the float32 matrices beside it. num_mixed, num_out: 16-bit columns
    in between, and of the result.
    """

    layer: int
    projection: GpuInt8
    gates: tuple[int, ...]
    num_mixed: int
    num_out: int

    def advance(
        self,
        stream: Stream,
        projected: torch.Tensor,
        gates: Sequence[torch.Tensor],
        place: DeltaPlace | DeltaRows,
        mixed: torch.Tensor,
        out: torch.Tensor,
        chunks: torch.Tensor | None = None,
    ) -> None:
        """out [T, num_out] of projected [T, columns] and gates; mixed [T, num_mixed] is overwritten, and so
        are gates and the state. chunks: workspace for many rows of one sequence."""
        ...


def gate_matrices(
    buffer: torch.Tensor, columns: Sequence[int], num_rows: int | None = None
) -> tuple[torch.Tensor, ...]:
    """[T, columns] each, one behind the other in the memory of a buffer [T, all columns or more]. num_rows:
    where they lie as matrices of so many rows, of which there is room for T."""
    step, found, after = len(buffer) if num_rows is None else num_rows, [], 0
    flat = buffer.flatten()
    for width in columns:
        found.append(flat[step * after : step * after + len(buffer) * width].view(len(buffer), width))
        after += width
    return tuple(found)


def packed(buffer: torch.Tensor, columns: int, after: int = 0) -> torch.Tensor:
    """[T, columns] without gaps in the memory of a buffer [T, as many columns or more]. after: columns of
    another such matrix, which lies before it."""
    num_rows = buffer.shape[0]
    if buffer.shape[1] == columns:
        return buffer
    return buffer.flatten()[num_rows * after : num_rows * (after + columns)].view(num_rows, columns)
