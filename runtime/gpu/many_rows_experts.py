"""Experts with many rows each: their INT4 weights as 16-bit floats, then the library's grouped product.

A few experts at a time: unpack the gate and up matrices, gather the rows routed to them, multiply, apply
silu(gate) * up, unpack the down matrices into the same place, multiply, scatter the rows back to their slots.
What rounding does is as in ``many_rows``: a weight becomes (code - 8) * scale rounded to 16 bits, and the
product of gate and up is rounded before silu, which the native kernel does not do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from krasis.formats.architecture_record import Architecture
from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.device.library import check_status
from krasis.runtime.gpu.arguments import CODES
from krasis.runtime.gpu.kernels import ExpertMatrix, GpuKernels, Routing
from krasis.runtime.gpu.many_rows import Thresholds, thresholds_of

logger = logging.getLogger(__name__)

M_BLOCK = 16
"""Rows are padded to so many an expert: what the library asks of the offsets' alignment."""

EXPERTS_AT_ONCE = 16
"""That are unpacked together: enough to fill a large GPU, and little memory."""

GroupedProduct = Callable[..., torch.Tensor]


def find_grouped_product() -> GroupedProduct | None:
    """torch's product of ragged groups, under the name this version has it by; None if it has none."""
    public: GroupedProduct | None = getattr(torch.nn.functional, "grouped_mm", None)
    private: GroupedProduct | None = getattr(torch, "_grouped_mm", None)
    return public or private


@dataclass(frozen=True, slots=True)
class ManyRowsBuffers:
    """Scratch memory on the device. weights: uint8, for the larger matrix of at least one expert. x: [rows,
    hidden]; gated: [rows, intermediate], both 16-bit; ends: int32 [num_experts]. rows: ``most_rows``."""

    weights: torch.Tensor
    x: torch.Tensor
    gated: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def allocate(
        cls, device: Device, architecture: Architecture, dtype: torch.dtype, rows: int
    ) -> ManyRowsBuffers:
        """For so many padded rows and ``EXPERTS_AT_ONCE``. Raises OutOfDeviceMemoryError."""
        a = architecture
        count = min(EXPERTS_AT_ONCE, a.num_experts)
        return cls(
            weights=device.empty((count * 2 * _gate_and_up_size(a) * dtype.itemsize,), torch.uint8),
            x=device.empty((rows, a.hidden_size), dtype),
            gated=device.empty((rows, a.expert_intermediate_size), dtype),
            ends=device.empty((a.num_experts,), torch.int32),
        )


def buffers_bytes(architecture: Architecture, dtype: torch.dtype, rows: int) -> int:
    """What ``ManyRowsBuffers.allocate`` takes, and the temporaries of the products beside it."""
    a = architecture
    weights = min(EXPERTS_AT_ONCE, a.num_experts) * 2 * _gate_and_up_size(a)
    columns = 2 * a.hidden_size + 3 * a.expert_intermediate_size
    return dtype.itemsize * (weights + rows * columns)


def _gate_and_up_size(architecture: Architecture) -> int:
    return architecture.hidden_size * architecture.expert_intermediate_size


def most_rows(routing: Routing) -> int:
    """Rows that padded experts can have at most."""
    return routing.max_blocks * routing.m_block


class ManyRowsExperts:
    """Chooses and runs the path. buffers: None: never taken."""

    def __init__(
        self, kernels: GpuKernels, buffers: ManyRowsBuffers | None, thresholds: Thresholds | None = None
    ) -> None:
        self._kernels, self._buffers = kernels, buffers
        self._multiply = find_grouped_product()
        self.thresholds = thresholds_of(kernels.device) if thresholds is None else thresholds
        if self._multiply is None and self.thresholds.rows_per_expert is not None:
            logger.info(
                "torch %s has no grouped product: experts keep to the native kernel", torch.__version__
            )

    def takes(self, num_slots: int, num_experts: int) -> bool:
        """Whether the path is taken for so many slots spread over so many experts; Routing must then be
        aligned with ``M_BLOCK``."""
        least = self.thresholds.rows_per_expert
        available = self._buffers is not None and self._multiply is not None
        return available and least is not None and num_slots >= least * num_experts

    def run(
        self,
        stream: Stream,
        x: torch.Tensor,
        routing: Routing,
        table: torch.Tensor,
        memory: Sequence[torch.Tensor],
        matrices: tuple[ExpertMatrix, ExpertMatrix],
        begin: int,
        end: int,
        slots: torch.Tensor,
        executed: torch.Tensor | None,
    ) -> None:
        """slots [T * top_k, hidden] = down(silu(gate(x)) * up(x)) for the slots of experts begin..end-1.

        Every one of them that has slots must be in the table. x [T, hidden] 16-bit; matrices: gate and up,
        then down.
        """
        buffers, (w13, w2) = self._buffers, matrices
        if buffers is None or self._multiply is None:
            raise NativeError("no scratch memory, or no grouped product in torch", where="many rows")
        if routing.m_block != M_BLOCK or len(buffers.x) < most_rows(routing):
            got = (routing.m_block, len(buffers.x))
            limit = (M_BLOCK, most_rows(routing))
            raise NativeError("blocks or buffers do not fit", where="many rows", got=got, limit=limit)
        at_once = buffers.weights.nbytes // (2 * max(w13.n * w13.k, w2.n * w2.k))
        if at_once == 0:
            raise NativeError("scratch holds no expert", where="many rows", got=buffers.weights.nbytes)
        for first in range(begin, end, at_once):
            last = min(end, first + at_once)
            self._gate_and_up(stream, x, routing, table, memory, w13, first, last)
            self._down(stream, routing, table, memory, w2, first, last, slots, executed)

    def _gate_and_up(
        self,
        stream: Stream,
        x: torch.Tensor,
        routing: Routing,
        table: torch.Tensor,
        memory: Sequence[torch.Tensor],
        w13: ExpertMatrix,
        first: int,
        last: int,
    ) -> None:
        buffers, kernels = self._open_buffers(), self._kernels
        rows, gated = buffers.x[: most_rows(routing)], buffers.gated[: most_rows(routing)]
        ends = buffers.ends[: last - first]
        weights = self._weights(w13, last - first, x.dtype)
        kernels.moe_gather(stream, x, routing, routing.top_k, first, last, rows, ends)
        kernels.marlin_dequant(stream, table, memory, w13, first, last - first, weights)
        multiply, silu_mul = self._open_product(), kernels.function("silu_mul")

        def action(handle: int) -> None:
            both = multiply(rows, weights.transpose(-2, -1), offs=ends)
            arguments = both.data_ptr(), len(both), gated.shape[1], CODES[both.dtype], gated.data_ptr()
            check_status(kernels.device.library, silu_mul(*arguments, handle), "krasis_cuda_silu_mul")

        stream.launch("grouped matmul", action, reads=(rows, weights, ends), writes=(gated,))

    def _down(
        self,
        stream: Stream,
        routing: Routing,
        table: torch.Tensor,
        memory: Sequence[torch.Tensor],
        w2: ExpertMatrix,
        first: int,
        last: int,
        slots: torch.Tensor,
        executed: torch.Tensor | None,
    ) -> None:
        buffers = self._open_buffers()
        rows, gated = buffers.x[: most_rows(routing)], buffers.gated[: most_rows(routing)]
        ends = buffers.ends[: last - first]
        weights = self._weights(w2, last - first, slots.dtype)
        self._kernels.marlin_dequant(stream, table, memory, w2, first, last - first, weights)
        multiply = self._open_product()

        def action(_: int) -> None:
            rows.copy_(multiply(gated, weights.transpose(-2, -1), offs=ends))

        stream.launch("grouped matmul", action, reads=(gated, weights, ends), writes=(rows,))
        self._kernels.moe_scatter(stream, rows, routing, first, last, slots, executed)

    def _weights(self, matrix: ExpertMatrix, count: int, dtype: torch.dtype) -> torch.Tensor:
        num_bytes = 2 * count * matrix.n * matrix.k
        return self._open_buffers().weights[:num_bytes].view(dtype).view(count, matrix.n, matrix.k)

    def _open_buffers(self) -> ManyRowsBuffers:
        if self._buffers is None:
            raise NativeError("no scratch memory", where="many rows")
        return self._buffers

    def _open_product(self) -> GroupedProduct:
        if self._multiply is None:
            raise NativeError("torch has no grouped product", where="many rows")
        return self._multiply
