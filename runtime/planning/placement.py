"""Where a model's bytes go on each GPU, and the largest prompt batch that all of them can carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from krasis.formats.errors import ResourceError, UsageError
from krasis.formats.units import format_bytes
from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning.hardware import GpuSpec
from krasis.runtime.planning.host_kv import kv_split
from krasis.runtime.planning.shape import AnyModel
from krasis.runtime.planning.sizes import ModelSizes
from krasis.runtime.planning.types import GpuPlacement, Workload
from krasis.runtime.planning.workspace import SCRATCH_BYTES, activation_bytes

SMALLER = (
    "a shorter context (krasis-run --ctx, krasis-info --context), a larger GPU, "
    "or none (krasis-run --device cpu, krasis-info --gpus none)"
)


def rank_experts(num_experts: int, num_ranks: int) -> list[tuple[int, int]]:
    """(first, count) of each rank's experts; counts differ by at most one, the larger first (128 / 3: 43, 43,
    42).
    """
    base, extra = divmod(num_experts, num_ranks)
    counts = [base + (rank < extra) for rank in range(num_ranks)]
    return [(sum(counts[:rank]), count) for rank, count in enumerate(counts)]


def rank_share(num_experts: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """(first, count) of one rank's experts of a layer: see ``rank_experts``."""
    return rank_experts(num_experts, num_ranks)[rank]


def gpu_workspace_bytes(model: AnyModel, batch_tokens: int, num_ranks: int) -> int:
    """Activations of one pass of ``batch_tokens`` on one of ``num_ranks`` GPUs, as they are allocated: see
    ``workspace``.

    Slots of all tokens, not of a rank's share: in the worst case all tokens choose one rank's experts.
    """
    return activation_bytes(model, batch_tokens, num_ranks) + SCRATCH_BYTES


@dataclass(frozen=True, slots=True)
class _Rank:
    """One GPU's share before the batch is known. ``free_bytes``: VRAM after reserve, dense weights and KV.

    first_expert, num_experts: of the layer with most experts. all_experts, all_experts_bytes: of all layers.
    """

    rank: int
    spec: GpuSpec
    first_expert: int
    num_experts: int
    all_experts: int
    all_experts_bytes: int
    dense_bytes: int
    kv_bytes: int
    free_bytes: int
    host_kv_layers: int
    host_kv_bytes: int


@dataclass(frozen=True, slots=True)
class GpuPlacements:
    """One way to use the GPUs' memory: the most tokens of a pass, and each GPU's placement."""

    batch_tokens: int
    gpus: tuple[GpuPlacement, ...]


def place_resident(sizes: ModelSizes, gpus: Sequence[GpuSpec], workload: Workload) -> GpuPlacements | None:
    """All experts in VRAM and the batch that fits beside them; None if a useful one does not.

    Raises as ``place_streamed``.
    """
    ranks = _ranks(sizes, gpus, workload)
    most = workload.prompt_tokens
    enough = min(most, assumed.RESIDENT_PREFILL_BATCH)
    if not all(_fits_resident(sizes, rank, enough, len(ranks)) for rank in ranks):
        return None
    return _placements(sizes, ranks, most, _resident_batch)


def place_streamed(sizes: ModelSizes, gpus: Sequence[GpuSpec], workload: Workload) -> GpuPlacements:
    """The batch comes first (every further pass streams experts again), then the fewest groups, then resident
    experts: what is left may hold all of them.

    Raises ResourceError with the numbers if something does not fit, UsageError if there are more GPUs than
    experts.
    """
    return _placements(sizes, _ranks(sizes, gpus, workload), workload.prompt_tokens, _streamed_batch)


def _placements(
    sizes: ModelSizes,
    ranks: Sequence[_Rank],
    most: int,
    batch_of: Callable[[ModelSizes, _Rank, int, int], int],
) -> GpuPlacements:
    """All ranks take the batch of the one with the least room."""
    batch = min(batch_of(sizes, rank, most, len(ranks)) for rank in ranks)
    return GpuPlacements(batch, tuple(_place(sizes, rank, batch, most, len(ranks)) for rank in ranks))


def _ranks(sizes: ModelSizes, gpus: Sequence[GpuSpec], workload: Workload) -> list[_Rank]:
    fewest = min(experts.count for _, experts in sizes.expert_layers)
    if len(gpus) > fewest:
        raise UsageError("more GPUs than experts", got=len(gpus), limit=fewest)
    if sizes.gpu_expert_bytes == 0:
        raise ResourceError(
            "this bundle has no GPU experts",
            hint="convert it with a GPU tier, or plan without GPUs (krasis-info --gpus none)",
        )
    split = kv_split(sizes, workload, len(gpus))
    kv_bytes = split.device_bytes
    ranks = []
    for rank, (first, count) in enumerate(rank_experts(sizes.most_experts, len(gpus))):
        needed = assumed.GPU_RESERVE_BYTES + sizes.dense_bytes + kv_bytes
        free = gpus[rank].vram_bytes - needed
        if free <= 0:
            raise ResourceError(
                "the dense weights and the KV cache do not fit in VRAM",
                where=f"GPU {rank}",
                got=f"needs {format_bytes(needed)}: dense {format_bytes(sizes.dense_bytes)}, "
                f"KV of {workload.context} tokens {format_bytes(kv_bytes)}, "
                f"reserve {format_bytes(assumed.GPU_RESERVE_BYTES)}",
                limit=f"has {format_bytes(gpus[rank].vram_bytes)}",
                hint=SMALLER,
            )
        own = [
            (layers * rank_share(experts.count, len(gpus), rank)[1], experts.gpu_bytes)
            for layers, experts in sizes.expert_layers
        ]
        ranks.append(
            _Rank(
                rank,
                gpus[rank],
                first,
                count,
                all_experts=sum(number for number, _ in own),
                all_experts_bytes=sum(number * num_bytes for number, num_bytes in own),
                dense_bytes=sizes.dense_bytes,
                kv_bytes=kv_bytes,
                free_bytes=free,
                host_kv_layers=workload.host_kv_layers,
                host_kv_bytes=split.host_bytes,
            )
        )
    return ranks


def _buffer_bytes(sizes: ModelSizes, group_experts: int) -> int:
    return 2 * group_experts * sizes.gpu_expert_bytes


def _fits_resident(sizes: ModelSizes, rank: _Rank, batch: int, num_ranks: int) -> bool:
    workspace = gpu_workspace_bytes(sizes.largest, batch, num_ranks)
    return rank.all_experts_bytes + workspace <= rank.free_bytes


def _batch_within(model: AnyModel, room_bytes: int, most_tokens: int, num_ranks: int) -> int:
    """The largest batch <= ``most_tokens`` whose workspace fits in ``room_bytes``; 0 if none does."""
    low, high = 0, most_tokens
    while low < high:
        middle = (low + high + 1) // 2
        if gpu_workspace_bytes(model, middle, num_ranks) <= room_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _resident_batch(sizes: ModelSizes, rank: _Rank, prompt_tokens: int, num_ranks: int) -> int:
    room = rank.free_bytes - rank.all_experts_bytes
    return _batch_within(sizes.largest, room, prompt_tokens, num_ranks)


def _streamed_batch(sizes: ModelSizes, rank: _Rank, prompt_tokens: int, num_ranks: int) -> int:
    least = min(prompt_tokens, assumed.MIN_PREFILL_BATCH)
    preferred = min(rank.num_experts, assumed.PREFERRED_GROUP_EXPERTS)
    room = rank.free_bytes - _buffer_bytes(sizes, preferred)
    batch = _batch_within(sizes.largest, room, prompt_tokens, num_ranks)
    if batch >= least:
        return batch
    needed = _buffer_bytes(sizes, 1) + gpu_workspace_bytes(sizes.largest, least, num_ranks)
    if needed > rank.free_bytes:
        raise ResourceError(
            "no room for two expert buffers and a batch of activations",
            where=f"GPU {rank.rank}",
            got=f"needs {format_bytes(needed)} beside dense weights and KV cache",
            limit=f"{format_bytes(rank.free_bytes)} of {format_bytes(rank.spec.vram_bytes)} are left",
            hint=SMALLER,
        )
    return least


def _place(sizes: ModelSizes, rank: _Rank, batch: int, prompt_tokens: int, num_ranks: int) -> GpuPlacement:
    workspace = gpu_workspace_bytes(sizes.largest, batch, num_ranks)
    room = rank.free_bytes - workspace
    if rank.all_experts_bytes <= room:
        groups, group_experts, resident = 0, 0, rank.all_experts
        resident_bytes = rank.all_experts_bytes
    else:
        # A batch cut short by VRAM takes what a larger group would, so that groups do not jump with the
        # batch.
        most = rank.num_experts if batch == prompt_tokens else assumed.PREFERRED_GROUP_EXPERTS
        groups = math.ceil(rank.num_experts / min(room // _buffer_bytes(sizes, 1), most, rank.num_experts))
        group_experts = math.ceil(rank.num_experts / groups)
        resident = (room - _buffer_bytes(sizes, group_experts)) // sizes.gpu_expert_bytes
        resident_bytes = resident * sizes.gpu_expert_bytes  # places of one size
    buffers = _buffer_bytes(sizes, group_experts)
    return GpuPlacement(
        rank=rank.rank,
        vram_bytes=rank.spec.vram_bytes,
        first_expert=rank.first_expert,
        num_experts=rank.num_experts,
        num_groups=groups,
        group_experts=group_experts,
        resident_experts=resident,
        reserve_bytes=assumed.GPU_RESERVE_BYTES,
        dense_bytes=rank.dense_bytes,
        kv_bytes=rank.kv_bytes,
        workspace_bytes=workspace,
        buffer_bytes=buffers,
        resident_bytes=resident_bytes,
        spare_bytes=room - buffers - resident_bytes,
        host_kv_layers=rank.host_kv_layers,
        host_kv_bytes=rank.host_kv_bytes,
    )
