"""``NamedSlots`` as arguments of ``krasis_cuda_moe_gemm``."""

from __future__ import annotations

from krasis.runtime.gpu.kernels.arguments import F32, I32, pointer, require, vector_pointer
from krasis.runtime.gpu.kernels.launcher import Tensors
from krasis.runtime.gpu.kernels.native import MoeGemmArgs
from krasis.runtime.gpu.kernels.routing import NamedSlots, Routing

COLUMNS = 64  # whose blocks count themselves together
MAX_SLOTS, M_BLOCK = 64, 16


def fits_named(routing: Routing) -> bool:
    """Whether a pass of one token may name its slots."""
    return routing.num_tokens == 1 and routing.num_slots <= MAX_SLOTS and routing.m_block == M_BLOCK


def set_named(args: MoeGemmArgs, named: NamedSlots, routing: Routing) -> tuple[Tensors, Tensors]:
    """Sets what names the slots. Returns what the product reads instead of a sorting, and what it adds to.

    Raises NativeError for several tokens, or too many slots.
    """
    require(fits_named(routing), "slots cannot be named", "moe_gemm.ids", routing.num_slots, MAX_SLOTS)
    choices = (1, routing.top_k)
    args.sorted_slots = args.block_experts = args.first_block = None
    args.ids = pointer(named.ids, choices, I32, "moe_gemm.ids")
    if named.sum is None:
        return (named.ids,), ()
    total = named.sum
    args.slot_weights = pointer(total.weights, choices, F32, "moe_gemm.slot_weights")
    args.hidden = vector_pointer(total.hidden, (1, args.n), F32, "moe_gemm.hidden")
    args.arrivals = pointer(
        total.arrivals[: args.n // COLUMNS], (args.n // COLUMNS,), I32, "moe_gemm.arrivals"
    )
    args.top_k = routing.top_k
    return (named.ids, total.weights), (total.hidden, total.arrivals)
