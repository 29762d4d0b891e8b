"""Every constant that a plan assumes rather than derives, each with its meaning. ``docs/PLANNING.md`` lists
them too.
"""

from __future__ import annotations

from krasis.runtime.settings import CPU_PREFILL_CHUNK

GPU_RESERVE_BYTES = 800_000_000
"""VRAM that is never ours: CUDA context, libraries' handles, fragmentation."""

GPU_CONTEXT_BYTES = 700_000_000
"""VRAM that a process takes beside torch's allocator: CUDA context and loaded kernels (an H200: half a GB and
more). Taken off a limit on a GPU's memory (``krasis-run --vram``); without a limit it is not free to begin
with.
"""

NCCL_BYTES = 1_200_000_000
"""The same of NCCL's buffers on each of several GPUs (two H200: 1.1 GB)."""

HOST_RESERVE_BYTES = 2_000_000_000
"""RAM for the system, Python and torch; on small machines at most an eighth of the RAM."""

MIN_PREFILL_BATCH = 256
"""Fewer prompt tokens a pass than this are not worth a pass: experts then shrink to smaller groups
instead.
"""

RESIDENT_PREFILL_BATCH = 2048
"""Holding all experts in VRAM is considered where so many tokens a pass fit beside them."""

TYPICAL_ANSWER_TOKENS = 256
"""Tokens of answer that a placement is judged by, after its prompt: few experts outside VRAM slow every one
of them (a hand-over a layer), a smaller batch slows the prompt once.
"""

WHOLE_ATTENTION_SHARE = 0.8
PREFIX_ATTENTION_SHARE = 0.39
"""Rate of attention as a share of a matmul's: of tokens from position 0, and of tokens after a prefix, whose
mask takes a slower kernel (H100: 610-640 and 298-318 of 780 TFLOP/s).
"""

ATTENTION_PIECE_BYTES = 192 * 2**20
"""Most bytes of one attention call's result; the tokens behind the first piece have a prefix."""

GROUPED_SHARE = 0.5
"""Rate of experts' grouped products as a share of a matmul's (H100: 344 and 429 of 780 TFLOP/s)."""

PADDED_ROWS = 20
"""Rows by which an expert's last block is not full, on average: so many more are computed (H100: 64 rows an
expert reach 0.7 of the rate of 2048).
"""

PREFERRED_GROUP_EXPERTS = 8
"""A group smaller than this leaves a grouped GEMM too little work; the batch shrinks first."""

CPU_PREFILL_BATCH = CPU_PREFILL_CHUNK
"""Tokens a pass when the CPU does everything."""

RING_BUFFERS = 2
"""Pinned staging buffers a GPU when experts are streamed from a mapped file, each of one expert group."""

MEMORY_READ_EFFICIENCY = 0.8
"""Share of the read bandwidth of RAM or VRAM that decode kernels reach; the CPU kernels were built to."""

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
    "whole_attention_share": (WHOLE_ATTENTION_SHARE, "GPU attention rate / matmul rate, from position 0"),
    "prefix_attention_share": (PREFIX_ATTENTION_SHARE, "GPU attention rate / matmul rate, after a prefix"),
    "grouped_share": (GROUPED_SHARE, "GPU expert product rate / matmul rate"),
    "padded_rows": (PADDED_ROWS, "rows computed for nothing, per expert and pass"),
    "typical_answer_tokens": (TYPICAL_ANSWER_TOKENS, "answer that a placement in VRAM is judged by"),
    "attention_cpu_share": (ATTENTION_CPU_SHARE, "CPU attention rate / int8 multiply-add rate"),
}
