"""Expected seconds from a roofline: bytes over bandwidth against operations over peak (docs/PLANNING.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from krasis.formats.architecture_record import Architecture
from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning.hardware import GpuSpec, HardwareSpec
from krasis.runtime.planning.shape import AnyModel, ModelShape, shape_of
from krasis.runtime.planning.sizes import ModelSizes, expert_weights
from krasis.runtime.planning.types import (
    Decode,
    GpuPlacement,
    HostPlacement,
    Prefill,
    PrefillPath,
    StartUp,
    Workload,
)


def distinct_experts(arch: Architecture | ModelShape, num_tokens: int) -> float:
    """Experts of a layer that ``num_tokens`` tokens touch, on average, if each picks its top-k at random."""
    share = arch.num_experts_per_token / arch.num_experts
    return arch.num_experts * -math.expm1(num_tokens * math.log1p(-share)) if share < 1 else arch.num_experts


def attention_macs(arch: Architecture | ModelShape, start: int, num_tokens: int) -> int:
    """Multiply-adds of one layer's causal attention, scores and values, of queries from ``start`` on."""
    keys = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return 2 * arch.attention_size * keys


def dense_macs_per_token(model: AnyModel) -> float:
    """Multiply-adds of a token in one layer's projections, router and MLP that every token takes, on
    average."""
    shape = shape_of(model)
    return shape.dense_macs / shape.num_layers


@dataclass(frozen=True, slots=True)
class _LayerTime:
    """One layer of one pass on the slowest rank, in seconds."""

    total: float
    dma: float
    expert: float
    dense: float
    attention: float
    exchange: float


def _prefill_of(
    path: PrefillPath, layers: Sequence[_LayerTime], num_layers: int, prompt_tokens: int
) -> Prefill:
    total = num_layers * sum(layer.total for layer in layers)
    return Prefill(
        path=path,
        num_passes=len(layers),
        total_s=total,
        tokens_per_s=prompt_tokens / total,
        dma_s=num_layers * sum(layer.dma for layer in layers),
        expert_s=num_layers * sum(layer.expert for layer in layers),
        dense_s=num_layers * sum(layer.dense for layer in layers),
        attention_s=num_layers * sum(layer.attention for layer in layers),
        exchange_s=num_layers * sum(layer.exchange for layer in layers),
    )


def _passes(prompt_tokens: int, batch_tokens: int) -> list[tuple[int, int]]:
    return [
        (start, min(batch_tokens, prompt_tokens - start)) for start in range(0, prompt_tokens, batch_tokens)
    ]


def gpu_prefill(
    sizes: ModelSizes,
    hardware: HardwareSpec,
    workload: Workload,
    batch_tokens: int,
    gpus: Sequence[GpuPlacement],
    host: HostPlacement,
) -> Prefill:
    """All of prefill on the GPUs; a layer takes as long as its slowest rank."""
    arch = sizes.shape
    layers = []
    for start, tokens in _passes(workload.prompt_tokens, batch_tokens):
        disk_s = host.from_disk_bytes / arch.num_expert_layers / (hardware.disk_gbps.value * 1e9)
        ranks = [
            _gpu_layer(sizes, hardware.gpus[gpu.rank], gpu, start, tokens, len(gpus), disk_s) for gpu in gpus
        ]
        layers.append(max(ranks, key=lambda layer: layer.total))
    resident = all(gpu.num_groups == 0 for gpu in gpus)
    path: PrefillPath = "gpu-resident" if resident else "gpu-streamed"
    return _prefill_of(path, layers, arch.num_layers, workload.prompt_tokens)


def dense_layer_s(
    sizes: ModelSizes, spec: GpuSpec, start: int, tokens: int, num_ranks: int
) -> tuple[float, float]:
    """(projections and router, attention) of one layer, tokens shared evenly by the ranks. Few tokens wait
    for the weights to be read.
    """
    arch = sizes.shape
    peak = spec.bf16_tflops.value * 1e12 * num_ranks
    whole = _whole_attention_tokens(arch, tokens) if start == 0 and num_ranks == 1 else 0
    whole_macs = attention_macs(arch, 0, whole)
    prefix_macs = attention_macs(arch, start, tokens) - whole_macs
    attention = whole_macs / assumed.WHOLE_ATTENTION_SHARE + prefix_macs / assumed.PREFIX_ATTENTION_SHARE
    read = sizes.dense_bytes / arch.num_layers / (spec.memory_gbps.value * 1e9)
    return max(2 * tokens * dense_macs_per_token(arch) / peak, read), 2 * attention / peak


def _whole_attention_tokens(arch: ModelShape, tokens: int) -> int:
    """Attention runs in pieces of equal size. Returns the tokens of the first from position 0: only they have
    no prefix. (Of several ranks, nearly all see one.)
    """
    num_pieces = math.ceil(tokens * 2 * arch.attention_size / assumed.ATTENTION_PIECE_BYTES)
    return tokens // num_pieces


def expert_products_s(sizes: ModelSizes, spec: GpuSpec, tokens: int, num_experts: int) -> float:
    """One layer's grouped products of ``num_experts`` of its experts. Each one that is touched computes some
    rows for nothing, so few rows an expert cost more each; and its weights are read once.
    """
    arch = sizes.shape
    share, touched = num_experts / arch.num_experts, distinct_experts(arch, tokens)
    rows = tokens * arch.num_experts_per_token + assumed.PADDED_ROWS * touched
    rate = spec.bf16_tflops.value * 1e12 * assumed.GROUPED_SHARE
    read = touched * sizes.gpu_expert_bytes / (spec.memory_gbps.value * 1e9)
    return share * max(2 * rows * expert_weights(arch) / rate, read)


def copy_s(sizes: ModelSizes, spec: GpuSpec, num_experts: float) -> float:
    """Copying so many experts of a layer over the GPU's link."""
    return num_experts * sizes.gpu_expert_bytes / (spec.link_gbps.value * 1e9)


def _exchange_s(arch: ModelShape, spec: GpuSpec, tokens: int, num_ranks: int) -> float:
    """All-gather of bf16 hidden states and reduce-scatter of bf16 outputs over the rank's link."""
    num_bytes = 2 * 2 * tokens * arch.hidden_size * (num_ranks - 1) / num_ranks
    return num_bytes / (spec.link_gbps.value * 1e9)


def _gpu_layer(
    sizes: ModelSizes,
    spec: GpuSpec,
    gpu: GpuPlacement,
    start: int,
    tokens: int,
    num_ranks: int,
    disk_s: float,
) -> _LayerTime:
    arch = sizes.shape
    dense, attention = dense_layer_s(sizes, spec, start, tokens, num_ranks)
    expert = arch.expert_share * expert_products_s(sizes, spec, tokens, gpu.num_experts)
    streamed = gpu.num_experts - gpu.resident_experts / arch.num_expert_layers
    touched = distinct_experts(arch, tokens) / arch.num_experts
    dma = copy_s(sizes, spec, streamed * touched)
    dma = arch.expert_share * max(dma, disk_s * touched) if streamed else 0.0
    ahead = min(1.0, assumed.DMA_GROUPS_AHEAD / gpu.num_groups) if gpu.num_groups else 0.0
    exposed = dma - min(dense + attention, ahead * dma)
    exchange = _exchange_s(arch, spec, tokens, num_ranks)
    total = dense + attention + exchange + max(expert, exposed)
    return _LayerTime(total, dma, expert, dense, attention, exchange)


def cpu_experts_s(sizes: ModelSizes, hardware: HardwareSpec, tokens: int) -> float:
    """One layer's experts on the CPU: their bytes from RAM once, or their multiply-adds."""
    arch = sizes.shape
    read = distinct_experts(arch, tokens) * sizes.cpu_expert_bytes / (hardware.ram_gbps.value * 1e9)
    macs = tokens * arch.num_experts_per_token * expert_weights(arch)
    return max(read, macs / (hardware.cpu_gmacs.value * 1e9))


def cpu_experts_prefill(
    sizes: ModelSizes, hardware: HardwareSpec, workload: Workload, batch_tokens: int
) -> Prefill:
    """Dense part on the first GPU, experts on the CPU: what a short prompt may prefer."""
    arch = sizes.shape
    layers = []
    for start, tokens in _passes(workload.prompt_tokens, batch_tokens):
        dense, attention = dense_layer_s(sizes, hardware.gpus[0], start, tokens, 1)
        expert = arch.expert_share * cpu_experts_s(sizes, hardware, tokens)
        total = dense + attention + expert + assumed.HANDOVER_S
        layers.append(_LayerTime(total, 0.0, expert, dense, attention, assumed.HANDOVER_S))
    return _prefill_of("cpu-experts", layers, arch.num_layers, workload.prompt_tokens)


def cpu_prefill(sizes: ModelSizes, hardware: HardwareSpec, workload: Workload, batch_tokens: int) -> Prefill:
    """Everything on the CPU, in batches."""
    arch = sizes.shape
    rate = hardware.cpu_gmacs.value * 1e9
    dense_read = sizes.dense_bytes / arch.num_layers / (hardware.ram_gbps.value * 1e9)
    layers = []
    for start, tokens in _passes(workload.prompt_tokens, batch_tokens):
        dense = max(tokens * dense_macs_per_token(arch) / rate, dense_read)
        attention = attention_macs(arch, start, tokens) / (rate * assumed.ATTENTION_CPU_SHARE)
        expert = arch.expert_share * cpu_experts_s(sizes, hardware, tokens)
        layers.append(_LayerTime(dense + attention + expert, 0.0, expert, dense, attention, 0.0))
    return _prefill_of("cpu", layers, arch.num_layers, workload.prompt_tokens)


def decode(
    sizes: ModelSizes, hardware: HardwareSpec, workload: Workload, gpus: Sequence[GpuPlacement]
) -> Decode:
    """One token after the prompt. Dense weights and KV are read by GPU 0 (the CPU without one), experts where
    they live; without CPU experts the routed ones are streamed.
    """
    arch = sizes.shape
    ram = hardware.ram_gbps.value * 1e9 * assumed.MEMORY_READ_EFFICIENCY
    kv_bytes = sizes.kv_bytes(workload.prompt_tokens, workload.kv_dtype)
    routed = arch.num_expert_layers * arch.num_experts_per_token
    hits = [routed * gpu.resident_experts / sizes.num_experts for gpu in gpus]
    cpu_bytes = (routed - sum(hits)) * sizes.cpu_expert_bytes if sum(hits) < routed else 0.0
    memory = hardware.gpus[0].memory_gbps.value * 1e9 * assumed.MEMORY_READ_EFFICIENCY if gpus else ram
    gpu_s = max(
        (
            hit
            * sizes.gpu_expert_bytes
            / (hardware.gpus[gpu.rank].memory_gbps.value * 1e9 * assumed.MEMORY_READ_EFFICIENCY)
            for hit, gpu in zip(hits, gpus, strict=True)
        ),
        default=0.0,
    )
    stream_s = 0.0 if sizes.cpu_expert_bytes else _stream_routed_s(sizes, hardware, gpus, hits)
    needs_handover = bool(gpus) and (cpu_bytes > 0 or len(gpus) > 1)
    handover = arch.num_expert_layers * assumed.HANDOVER_S if needs_handover else 0.0
    dense_s, kv_s, cpu_s = sizes.dense_bytes / memory, kv_bytes / memory, cpu_bytes / ram
    total = dense_s + kv_s + max(cpu_s, gpu_s, stream_s) + handover
    return Decode(total, 1 / total, dense_s, kv_s, cpu_s, gpu_s, handover, round(cpu_bytes), stream_s)


def _stream_routed_s(
    sizes: ModelSizes, hardware: HardwareSpec, gpus: Sequence[GpuPlacement], hits: Sequence[float]
) -> float:
    """One token's experts that are not in VRAM, each rank's over its own link."""
    arch = sizes.shape
    a_layer = arch.num_expert_layers * arch.num_experts_per_token / arch.num_experts
    cold = [max(0.0, a_layer * gpu.num_experts - hit) for gpu, hit in zip(gpus, hits, strict=True)]
    return max(
        (copy_s(sizes, hardware.gpus[gpu.rank], count) for count, gpu in zip(cold, gpus, strict=True)),
        default=0.0,
    )


def start_up(
    sizes: ModelSizes, hardware: HardwareSpec, gpus: Sequence[GpuPlacement], host: HostPlacement
) -> StartUp:
    """Reading what must be in place before the first prompt; CPU experts are mapped and cost nothing once
    cached.
    """
    disk, ram = hardware.disk_gbps.value * 1e9, hardware.ram_gbps.value * 1e9
    to_gpu = max(
        (
            (gpu.dense_bytes + gpu.resident_bytes) / (hardware.gpus[gpu.rank].link_gbps.value * 1e9)
            for gpu in gpus
        ),
        default=0.0,
    )
    # Copying from the page cache to the arena reads and writes every byte.
    arena = 2 * host.pinned_bytes / ram if host.expert_store == "pinned-arena" else 0.0
    uploaded = sum(gpu.resident_bytes for gpu in gpus) if host.expert_store == "none" else 0
    dense = sizes.dense_bytes + sizes.embedding_bytes
    from_disk = dense + host.cpu_experts_bytes + host.pinned_bytes + host.page_cache_bytes + uploaded
    warm = to_gpu + arena
    return StartUp(cold_s=max(from_disk / disk, warm), warm_s=warm)
