"""Which rows belong to which expert, as buffers on the device; where a matrix lies in an expert's record."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.mlps import Activation
from krasis.runtime.device.api import Device
from krasis.runtime.gpu.kernels.native import cuda_prototype

M_BLOCKS = (16, 32, 64, 128)
SILU = Activation()


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """A Marlin matrix [k, n] of 4 bits, its bytes counted from the beginning of an expert's record.

    group: weights along k that share a scale; k: one scale a column. scale_dtype: bfloat16 or float16; uint8
    for MXFP4, whose scales are exponents of blocks of 32.
    """

    codes_offset: int
    scales_offset: int
    group: int
    k: int
    n: int
    scale_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """What a layer's experts are besides their matrices.

    gate_bias, up_bias float32 [num_experts, intermediate], down_bias [num_experts, hidden], or all None.
    """

    activation: Activation = SILU
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


PLAIN_EXPERTS = ExpertForm()


@dataclass(frozen=True, slots=True)
class NamedSlots:
    """What one token's products need instead of sorting: ids int32 [1, K], the expert of each slot, -1: none.

    ``sum``, of a second product: the first's is None.
    """

    ids: torch.Tensor
    sum: SlotSum | None = None


@dataclass(frozen=True, slots=True)
class SlotSum:
    """hidden float32 [1, n] += weights float32 [1, K] times the slots. arrivals int32 [n / 64 or more]:
    zeros, as which they are left."""

    weights: torch.Tensor
    hidden: torch.Tensor
    arrivals: torch.Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What ``GpuKernels.align`` fills: the slots (token * top_k + choice) sorted by expert.

    Each expert is padded to whole blocks of m_block rows. sorted_slots int32 [blocks * m_block], -1: padding;
    block_experts int32 [blocks]; first_block int32 [num_experts + 1]; counts int32 [num_experts];
    num_invalid int32 [1]: ids that are no expert. What lies past the last block is undefined.
    """

    sorted_slots: torch.Tensor
    block_experts: torch.Tensor
    first_block: torch.Tensor
    counts: torch.Tensor
    num_invalid: torch.Tensor
    num_tokens: int
    top_k: int
    num_experts: int
    m_block: int
    library: ctypes.CDLL

    @classmethod
    def allocate(cls, device: Device, max_tokens: int, top_k: int, num_experts: int) -> Routing:
        """Buffers for up to max_tokens tokens and any m_block. Raises OutOfDeviceMemoryError."""
        library = device.library
        num_slots = max_tokens * top_k
        blocks = {size: _max_blocks(library, num_slots, num_experts, size) for size in M_BLOCKS}
        return cls(
            sorted_slots=device.empty((max(size * num for size, num in blocks.items()),), torch.int32),
            block_experts=device.empty((max(blocks.values()),), torch.int32),
            first_block=device.empty((num_experts + 1,), torch.int32),
            counts=device.empty((num_experts,), torch.int32),
            num_invalid=device.empty((1,), torch.int32),
            num_tokens=max_tokens,
            top_k=top_k,
            num_experts=num_experts,
            m_block=M_BLOCKS[-1],
            library=library,
        )

    @property
    def num_slots(self) -> int:
        """Routed copies of tokens."""
        return self.num_tokens * self.top_k

    @property
    def max_blocks(self) -> int:
        """Blocks there can be at most."""
        return len(self.block_experts)

    def view(self, num_tokens: int, m_block: int | None = None) -> Routing:
        """The same buffers for fewer tokens. m_block: 16, 32, 64 or 128; None: what suits so many slots."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise NativeError(
                "more tokens than buffers", where="routing", got=num_tokens, limit=self.num_tokens
            )
        num_slots = num_tokens * self.top_k
        chosen = m_block or cuda_prototype(self.library, "moe_m_block")(num_slots, self.num_experts)
        if chosen not in M_BLOCKS:
            raise NativeError("no such block", where="routing", got=chosen, limit=M_BLOCKS)
        blocks = _max_blocks(self.library, num_slots, self.num_experts, chosen)
        return Routing(
            self.sorted_slots[: blocks * chosen],
            self.block_experts[:blocks],
            self.first_block,
            self.counts,
            self.num_invalid,
            num_tokens,
            self.top_k,
            self.num_experts,
            chosen,
            self.library,
        )


def _max_blocks(library: ctypes.CDLL, num_slots: int, num_experts: int, m_block: int) -> int:
    return cuda_prototype(library, "align_max_blocks")(num_slots, num_experts, m_block)
