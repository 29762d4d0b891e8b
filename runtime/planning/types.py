"""The result of planning: plain records that print and serialise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from krasis.runtime.planning.hardware import HardwareSpec
from krasis.runtime.planning.sizes import ModelSizes

ExpertPath = Literal["streamed", "routed", "resident", "cpu"]
"""Where a prompt's experts are computed, and how they get there: on the GPU, copied all (``streamed``) or
those that were chosen (``routed``), or in VRAM for good (``resident``); or on the CPU.
"""
StoreMethod = Literal["in-place", "arena", "ring"]
"""How the host's memory holds the GPUs' experts: the files' pages pinned where they are mapped, a pinned
copy, or a pinned ring in front of the files.
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked: positions of KV cache kept, tokens of the prompt, and the cache's dtype (f16, bf16,
    f32). slots: sequences at once. host_kv_layers: so many layers' keys and values lie in the host's memory
    beside a GPU.
    """

    context: int
    prompt_tokens: int
    kv_dtype: str = "f16"
    slots: int = 1
    host_kv_layers: int = 0


@dataclass(frozen=True, slots=True)
class GpuPlacement:
    """Where one GPU's memory goes. The ``_bytes`` of all parts and ``spare_bytes`` add up to ``vram_bytes``.

    experts: of each layer, [first_expert, first_expert + num_experts) belong to this rank.
    num_groups, group_experts: a layer's experts arrive in that many groups, two buffers of ``group_experts``
    experts; 0 and 0 when all of the rank's experts live in VRAM. resident_experts counts over all layers.
    host_kv_layers: so many layers keep keys and values in the host's memory, host_kv_bytes of it.
    """

    rank: int
    vram_bytes: int
    first_expert: int
    num_experts: int
    num_groups: int
    group_experts: int
    resident_experts: int
    reserve_bytes: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    buffer_bytes: int
    resident_bytes: int
    spare_bytes: int
    host_kv_layers: int = 0
    host_kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HostPlacement:
    """Where the RAM goes. All ``_bytes`` but ``from_disk_bytes`` and the last add up to ``ram_bytes``.

    page_cache_bytes: GPU experts kept in the page cache behind a ring. from_disk_bytes: GPU experts that do
    not fit in RAM and are read from disk in every pass over the experts. pinned_bytes: of an arena, of the
    page cache itself (in place), or of the ring.
    """

    ram_bytes: int
    expert_store: StoreMethod | Literal["none"]
    reserve_bytes: int
    dense_bytes: int
    cpu_experts_bytes: int
    pinned_bytes: int
    page_cache_bytes: int
    kv_bytes: int
    workspace_bytes: int
    spare_bytes: int
    from_disk_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Prefill:
    """Expected time of the prompt. The parts are summed over layers and passes; overlapped parts exceed
    ``total_s``.
    """

    path: ExpertPath
    num_passes: int
    total_s: float
    tokens_per_s: float
    dma_s: float
    expert_s: float
    dense_s: float
    attention_s: float
    exchange_s: float


@dataclass(frozen=True, slots=True)
class Decode:
    """Expected time of one token after the prompt. handover_s: what layers take besides reading. stream_s: of
    experts streamed for want of CPU experts. host_kv_s: of keys and values that lie in the host's memory,
    host_kv_bytes.
    """

    total_s: float
    tokens_per_s: float
    dense_s: float
    kv_s: float
    cpu_experts_s: float
    gpu_experts_s: float
    handover_s: float
    cpu_experts_bytes: int
    stream_s: float = 0.0
    host_kv_s: float = 0.0
    host_kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StartUp:
    """Time until the first prompt can start: from a cold disk, and with the bundle in the page cache."""

    cold_s: float
    warm_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A complete plan. ``batch_tokens``: the most prompt tokens that share one pass over the experts."""

    sizes: ModelSizes
    hardware: HardwareSpec
    workload: Workload
    batch_tokens: int
    gpus: tuple[GpuPlacement, ...]
    host: HostPlacement
    prefill: Prefill
    decode: Decode
    start_up: StartUp
