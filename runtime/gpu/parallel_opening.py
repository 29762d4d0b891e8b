"""Whether the ranks of rank 0's host decode together, and this rank's part in it."""

from __future__ import annotations

import logging

from krasis.runtime.gpu.decode import MAX_ROWS, TIMEOUT_S
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.gpu.parallel_decode import RankLink
from krasis.runtime.gpu.parallel_follower import RankFollower
from krasis.runtime.gpu.parallel_memory import RankMemory, share_memory

logger = logging.getLogger(__name__)

FOLLOWER_PATIENCE = 3.0
"""Times that of rank 0's GPU, which waits for the CPU and for every rank in turn: the side that gives up
first names what did not come."""


def open_decode_ranks(
    model: GpuModel,
    product: ExpertProduct,
    residency: Residency | None,
    parallel: Parallel,
    has_cpu_experts: bool,
) -> RankLink | RankFollower | None:
    """Called on every rank. None with one rank, on other hosts than rank 0's, where a rank has no room for
    experts, and where some are neither in VRAM nor the CPU's.

    Raises OutOfDeviceMemoryError.
    """
    if parallel.num_ranks == 1:
        return None
    keeps = parallel.agree(int(residency is not None))
    has_all = parallel.agree(int(residency is not None and residency.has_all_own))
    is_one_host = parallel.agree(parallel.num_local_ranks) == parallel.num_ranks
    is_complete = bool(has_all) and is_one_host
    if not keeps or not (is_complete or has_cpu_experts):
        return None
    max_rows = min(model.cache.num_slots, MAX_ROWS)
    num_bytes = RankMemory.num_bytes(parallel.num_local_ranks, max_rows, model.shape)
    shared = share_memory(parallel, num_bytes)
    if shared is None or residency is None:
        return None
    memory = RankMemory(model.device, *shared, max_rows, model.shape)
    if parallel.rank == 0:
        return RankLink(model, memory, residency, TIMEOUT_S, is_complete=is_complete)
    patience_s = FOLLOWER_PATIENCE * TIMEOUT_S
    return RankFollower(model, product, memory, residency, patience_s, rank=parallel.rank, max_rows=max_rows)
