"""Where the host's RAM goes: CPU experts mapped from the page cache, GPU experts pinned where they are
mapped, pinned in an arena, or mapped behind a pinned ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from krasis.formats.errors import ResourceError
from krasis.formats.units import format_bytes
from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning.hardware import HardwareSpec
from krasis.runtime.planning.shape import AnyModel, largest_shape
from krasis.runtime.planning.sizes import ModelSizes
from krasis.runtime.planning.types import GpuPlacement, HostPlacement, StoreMethod, Workload


def cpu_workspace_bytes(model: AnyModel, batch_tokens: int) -> int:
    """Activations of one CPU pass of ``batch_tokens``: f32 residual, normed and quantised input, qkv,
    attention, experts' rows.
    """
    arch = largest_shape(model)
    per_token = 9 * arch.hidden_size + 4 * (arch.qkv_rows + arch.attention_size)
    per_token += 4 * arch.mlp_columns + 5 * arch.mlp_intermediate
    per_row = 9 * arch.expert_intermediate_size + 4 * arch.hidden_size
    return batch_tokens * (per_token + arch.num_experts_per_token * per_row)


def host_reserve_bytes(ram_bytes: int) -> int:
    """RAM left to the system."""
    return min(assumed.HOST_RESERVE_BYTES, ram_bytes // 8)


@dataclass(frozen=True, slots=True)
class _Store:
    kind: StoreMethod | Literal["none"]
    pinned_bytes: int
    page_cache_bytes: int
    from_disk_bytes: int
    reason: str


def place_on_host(
    sizes: ModelSizes,
    hardware: HardwareSpec,
    workload: Workload,
    batch_tokens: int,
    gpus: Sequence[GpuPlacement],
) -> HostPlacement:
    """The RAM's parts. Raises ResourceError with the numbers if what must stay in RAM does not fit."""
    ram_bytes = int(hardware.ram_bytes.value)
    all_resident = bool(gpus) and all(gpu.num_groups == 0 for gpu in gpus)
    # With GPUs only the embedding table is read on the host; without, everything is.
    dense = sizes.embedding_bytes + (0 if gpus else sizes.dense_bytes)
    kv_bytes = sum(gpu.host_kv_bytes for gpu in gpus)
    if not gpus:
        kv_bytes = sizes.sequence_bytes(workload.context, workload.kv_dtype, "rings")
    cpu_experts = 0 if all_resident else sizes.cpu_experts_bytes
    workspace = cpu_workspace_bytes(sizes.largest, 1 if gpus else batch_tokens)
    # With GPUs decode can stream what it needs, slowly.
    if not gpus and cpu_experts == 0:
        raise ResourceError("this bundle has no CPU experts", hint="convert it with a CPU tier")
    reserve = host_reserve_bytes(ram_bytes)
    needed = reserve + dense + kv_bytes + cpu_experts + workspace
    ring = sum(assumed.RING_BUFFERS * gpu.group_experts * sizes.gpu_expert_bytes for gpu in gpus)
    if needed + ring > ram_bytes:
        raise _too_little_ram(needed, ring, ram_bytes, cpu_experts, sizes)
    store = _expert_store(sizes, gpus, ram_bytes - needed, ring, hardware.pins_files)
    return HostPlacement(
        ram_bytes=ram_bytes,
        expert_store=store.kind,
        reserve_bytes=reserve,
        dense_bytes=dense,
        cpu_experts_bytes=cpu_experts,
        pinned_bytes=store.pinned_bytes,
        page_cache_bytes=store.page_cache_bytes,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace,
        spare_bytes=ram_bytes - needed - store.pinned_bytes - store.page_cache_bytes,
        from_disk_bytes=store.from_disk_bytes,
        reason=store.reason,
    )


def _expert_store(
    sizes: ModelSizes, gpus: Sequence[GpuPlacement], free_bytes: int, ring_bytes: int, pins_files: bool
) -> _Store:
    if not gpus:
        return _Store("none", 0, 0, 0, "without a GPU only CPU experts are used")
    resident = sum(gpu.resident_experts for gpu in gpus)
    # Places of one size hold smaller experts too.
    streamed = max(0, sizes.gpu_experts_bytes - sum(gpu.resident_bytes for gpu in gpus))
    if resident == sizes.num_experts:
        return _Store("none", 0, 0, 0, "all experts live in VRAM")
    # Resident experts change with use, so the arena holds every expert.
    arena = sizes.gpu_experts_bytes
    if arena <= free_bytes:
        held = f"the RAM holds all GPU experts ({format_bytes(arena)}) pinned"
        if pins_files:
            return _Store("in-place", arena, 0, 0, f"{held}, and the bundle's pages can be, uncopied")
        return _Store("arena", arena, 0, 0, held)
    cached = min(arena, free_bytes - ring_bytes)
    from_disk = min(streamed, arena - cached)
    reason = f"an arena of {format_bytes(arena)} does not fit in the {format_bytes(free_bytes)} that are left"
    return _Store("ring", ring_bytes, cached, from_disk, reason)


def _too_little_ram(
    needed: int, ring: int, ram_bytes: int, cpu_experts: int, sizes: ModelSizes
) -> ResourceError:
    from krasis.formats.layouts import find_expert_format

    detail = f"CPU experts {format_bytes(cpu_experts)}"
    if ring:
        detail += f", pinned ring {format_bytes(ring)}"
    hint = "a machine with more RAM"
    held = find_expert_format(sizes.cpu_layout)
    if held is None or held.bits > 4:
        hint = "convert with INT4 CPU experts (about half the bytes), or " + hint
    return ResourceError(
        "the model does not fit in RAM",
        got=f"needs {format_bytes(needed + ring)}: {detail}, the rest dense weights, KV cache and reserve",
        limit=f"has {format_bytes(ram_bytes)}",
        hint=hint,
    )
