"""Every constant that a plan assumes rather than derives, each with its meaning. ``docs/PLANNING.md`` lists
them too.
"""

from __future__ import annotations

from krasis.runtime.settings import CPU_PREFILL_CHUNK

GPU_RESERVE_BYTES = 800_000_000
"""VRAM that is never ours: CUDA context, libraries' handles, fragmentation."""

GPU_OPERATORS_BYTES = 400_000_000
"""The part of it that libraries and operators allocate while tokens are computed. The rest stands for the
CUDA context: beside that of a running process, which has it, only this much must stay free.
"""

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
"""Most bytes of one attention call's result: as many heads as these hold."""

GROUPED_SHARE = 0.5
"""Rate of experts' grouped products as a share of a matmul's (H100: 344 and 429 of 780 TFLOP/s)."""

MXFP4_GROUPED_SHARE = 0.31
"""The same of MXFP4's codes, whose way to 16 bits is longer (gpt-oss-20b on an H200: 9.6 ms a layer of
10,000 tokens, 1.5 of them attention and dense products).
"""

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

LATE_LAYER_S = 60e-6
"""What a layer of a token takes more where GPU and CPU compute its experts together, and threads are on all
CPUs: one that the system holds up makes all wait. The best token has none of it, the median of H100 and H200
machines with 16 and 32 CPUs this much (11 to 94 layers).
"""

RANKS_LAYER_S = 25e-6
"""One layer's rows of a token to the other GPUs of a host and their sums back: measured on two H200, 24
layers of Qwen3-235B's shape (docs/MULTI_GPU.md).
"""

LATE_RANKS_S = 75e-6
"""What that layer takes more again where several GPUs decode beside the CPU, for their processes run on the
same CPUs (two H200 held to 16 GiB, 24 layers: the best token 6.4 ms, the median 10.1).
"""

GPU_DECODE_GBPS = 3000.0
GPU_DECODE_LAYER_S = 60e-6
"""Most that decode kernels read of VRAM, and what a layer takes beside it where nothing waits for the CPU:
the first from layers of two widths, all in VRAM (an H200's kernels alone: 59 us of 38 MB, 96 us of 150 MB),
the second from whole tokens of 24 layers (120 us a layer, the output head included).
"""

CPU_EXPERTS_LAYER_S = 70e-6
CPU_DENSE_LAYER_S = 120e-6
"""What a layer's experts take on the CPU at decode beside being read, and without a GPU the rest of a layer:
threads that meet (16 threads of an H100's machine, layers of two widths: 65 to 90 us, and 105 to 220 us).
"""

PLACED_AT_OPENING = 0.5
"""From this share of a GPU's experts on, those that live in VRAM are there when a bundle is opened; fewer are
placed when tokens were counted, and the first prompt copies all (two H200 held to 16 GiB, with 3 to 16 %: the
times of copying all).
"""

ATTENTION_CPU_SHARE = 0.25
"""Rate of float attention on the CPU as a share of its int8 multiply-add rate (4 bytes an operand against
1).
"""

PROCESS_START_S = 0.75
"""Python, libraries and opening a bundle, until a first prompt can begin on a CPU."""

CUDA_START_S = 7.2
RANKS_START_S = 6.0
PIN_GBPS = 14.0
"""With a GPU that takes so much more (CUDA's context and libraries, buffers), with several GPUs so much again
(processes that find each other, NCCL), and pinned memory is registered at this rate by each process: from the
command to the first token of 18, 45 and 94 layers on H200 machines, less the prompt.
"""

DMA_GROUPS_AHEAD = 2
"""Expert groups whose DMA can be under way during attention: both buffers are free then."""

DESCRIPTIONS: dict[str, tuple[float, str]] = {
    "gpu_reserve_bytes": (GPU_RESERVE_BYTES, "VRAM left to CUDA context and libraries"),
    "host_reserve_bytes": (HOST_RESERVE_BYTES, "RAM left to the system (at most 1/8 of it)"),
    "memory_read_efficiency": (MEMORY_READ_EFFICIENCY, "share of read bandwidth that decode reaches"),
    "handover_s": (HANDOVER_S, "GPU-CPU-GPU hand-over, per layer and token"),
    "late_layer_s": (LATE_LAYER_S, "a thread that is late, per layer that GPU and CPU share and token"),
    "late_ranks_s": (LATE_RANKS_S, "the same more where several GPUs share it"),
    "ranks_layer_s": (RANKS_LAYER_S, "GPU-GPUs-GPU exchange, per layer and token"),
    "gpu_decode_gbps": (GPU_DECODE_GBPS, "most that GPU decode reads of VRAM, GB/s"),
    "gpu_decode_layer_s": (GPU_DECODE_LAYER_S, "a layer of a token on the GPU alone, beside reading"),
    "cpu_experts_layer_s": (CPU_EXPERTS_LAYER_S, "a layer's experts of a token on the CPU, beside reading"),
    "cpu_dense_layer_s": (CPU_DENSE_LAYER_S, "the rest of a layer on the CPU, beside reading"),
    "placed_at_opening": (
        PLACED_AT_OPENING,
        "share of experts in VRAM from which on a first prompt has them",
    ),
    "whole_attention_share": (WHOLE_ATTENTION_SHARE, "GPU attention rate / matmul rate, from position 0"),
    "prefix_attention_share": (PREFIX_ATTENTION_SHARE, "GPU attention rate / matmul rate, after a prefix"),
    "grouped_share": (GROUPED_SHARE, "GPU expert product rate / matmul rate"),
    "mxfp4_grouped_share": (MXFP4_GROUPED_SHARE, "the same of experts in MXFP4"),
    "padded_rows": (PADDED_ROWS, "rows computed for nothing, per expert and pass"),
    "process_start_s": (PROCESS_START_S, "Python, libraries, opening"),
    "cuda_start_s": (CUDA_START_S, "CUDA and buffers, more"),
    "ranks_start_s": (RANKS_START_S, "processes of several GPUs, more"),
    "pin_gbps": (PIN_GBPS, "registering of pinned memory, GB/s a process"),
    "typical_answer_tokens": (TYPICAL_ANSWER_TOKENS, "answer that a placement in VRAM is judged by"),
    "attention_cpu_share": (ATTENTION_CPU_SHARE, "CPU attention rate / int8 multiply-add rate"),
}
