"""Every constant that a plan assumes rather than derives, each with its meaning. ``docs/PLANNING.md`` lists
them too.
"""

from __future__ import annotations

GPU_RESERVE_BYTES = 800_000_000
"""VRAM that is never ours: CUDA context, libraries' handles, fragmentation."""

HOST_RESERVE_BYTES = 2_000_000_000
"""RAM for the system, Python and torch; on small machines at most an eighth of the RAM."""

MIN_PREFILL_BATCH = 256
"""Fewer prompt tokens a pass than this are not worth a pass: experts then shrink to smaller groups
instead.
"""

RESIDENT_PREFILL_BATCH = 2048
"""With all experts in VRAM a pass costs no DMA, so this many tokens a pass are enough."""

PREFERRED_GROUP_EXPERTS = 8
"""A group smaller than this leaves a grouped GEMM too little work; the batch shrinks first."""

CPU_PREFILL_BATCH = 512
"""Tokens a pass when the CPU does everything."""

RING_BUFFERS = 2
"""Pinned staging buffers a GPU when experts are streamed from a mapped file, each of one expert group."""

MEMORY_READ_EFFICIENCY = 0.8
"""Share of the RAM's or VRAM's read bandwidth that decode kernels reach (issue 2's target on the CPU)."""

HANDOVER_S = 25e-6
"""One layer's hand-over of activations from GPU to CPU and back at decode."""

ATTENTION_CPU_SHARE = 0.25
"""Rate of float attention on the CPU as a share of its int8 multiply-add rate (4 bytes an operand against
1).
"""

DMA_GROUPS_AHEAD = 2
"""Expert groups whose DMA can be under way during attention: both buffers are free then."""

DESCRIPTIONS: dict[str, tuple[float, str]] = {
    "gpu_reserve_bytes": (GPU_RESERVE_BYTES, "VRAM left to CUDA context and libraries"),
    "host_reserve_bytes": (HOST_RESERVE_BYTES, "RAM left to the system (at most 1/8 of it)"),
    "memory_read_efficiency": (MEMORY_READ_EFFICIENCY, "share of read bandwidth that decode reaches"),
    "handover_s": (HANDOVER_S, "GPU-CPU-GPU hand-over, per layer and token"),
    "attention_cpu_share": (ATTENTION_CPU_SHARE, "CPU attention rate / int8 multiply-add rate"),
}
