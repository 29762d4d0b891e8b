"""Expected seconds from a roofline: bytes over bandwidth against operations over peak (docs/PLANNING.md).

Every figure is that of one layer of a kind; layers of several kinds add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning.hardware import GpuSpec, HardwareSpec
from krasis.runtime.planning.host_kv import read_bytes, staging_s
from krasis.runtime.planning.mixing import expansion_macs, gpu_mixer_macs, mixer_macs
from krasis.runtime.planning.placement import rank_share
from krasis.runtime.planning.sizes import ExpertSizes, LayerSizes, ModelSizes
from krasis.runtime.planning.types import (
    Decode,
    ExpertPath,
    GpuPlacement,
    HostPlacement,
    Prefill,
    StartUp,
    Workload,
)


def distinct_experts(experts: ExpertSizes, num_tokens: int) -> float:
    """Experts of a layer that ``num_tokens`` tokens touch, on average, if each picks its top-k at random."""
    share = experts.top_k / experts.count
    return experts.count * -math.expm1(num_tokens * math.log1p(-share)) if share < 1 else experts.count


@dataclass(frozen=True, slots=True)
class _LayerTime:
    """One layer of one pass on the slowest rank, in seconds."""

    total: float
    dma: float
    expert: float
    dense: float
    attention: float
    exchange: float


def _prefill(
    path: ExpertPath,
    sizes: ModelSizes,
    workload: Workload,
    batch_tokens: int,
    layer_time: Callable[[LayerSizes, int, int], _LayerTime],
) -> Prefill:
    """The passes of a prompt. layer_time: of one layer of a kind, for (first position, tokens)."""
    passes = _passes(workload.prompt_tokens, batch_tokens)
    times = [(kind.count, [layer_time(kind, *one) for one in passes]) for kind in sizes.layers]

    def summed(part: str) -> float:
        return math.fsum(count * sum(getattr(time, part) for time in of_kind) for count, of_kind in times)

    total = summed("total")
    return Prefill(
        path=path,
        num_passes=len(passes),
        total_s=total,
        tokens_per_s=workload.prompt_tokens / total,
        dma_s=summed("dma"),
        expert_s=summed("expert"),
        dense_s=summed("dense"),
        attention_s=summed("attention"),
        exchange_s=summed("exchange"),
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

    def layer_time(kind: LayerSizes, start: int, tokens: int) -> _LayerTime:
        disk_s = _from_disk_bytes(sizes, kind, host) / (hardware.disk_gbps.value * 1e9)
        specs = [hardware.gpus[gpu.rank] for gpu in gpus]
        kv_s = [staging_s(sizes, workload, kind, spec, start, tokens) for spec in specs]
        ranks = [
            _gpu_layer(sizes, spec, gpu, kind, start, tokens, len(gpus), disk_s, copies_s)
            for gpu, spec, copies_s in zip(gpus, specs, kv_s, strict=True)
        ]
        return max(ranks, key=lambda layer: layer.total)

    path: ExpertPath = "resident" if all(gpu.num_groups == 0 for gpu in gpus) else "streamed"
    return _prefill(path, sizes, workload, batch_tokens, layer_time)


def _from_disk_bytes(sizes: ModelSizes, kind: LayerSizes, host: HostPlacement) -> float:
    """One layer's share of what every pass reads from the disk."""
    if kind.experts is None or host.from_disk_bytes == 0:
        return 0.0
    return host.from_disk_bytes * kind.experts.count * kind.experts.gpu_bytes / sizes.gpu_experts_bytes


def dense_layer_s(
    sizes: ModelSizes, kind: LayerSizes, spec: GpuSpec, start: int, tokens: int, num_ranks: int
) -> tuple[float, float]:
    """(products of all weights but routed experts', attention) of one layer, tokens shared evenly by the
    ranks. Few tokens wait for the weights to be read.
    """
    mixer = kind.layer.mixer
    peak = spec.bf16_tflops.value * 1e12 * num_ranks
    whole = tokens if start == 0 and num_ranks == 1 else 0  # of several ranks nearly all see a prefix
    whole_macs = gpu_mixer_macs(mixer, 0, whole)
    prefix_macs = gpu_mixer_macs(mixer, start, tokens) - whole_macs
    attention = whole_macs / assumed.WHOLE_ATTENTION_SHARE + prefix_macs / assumed.PREFIX_ATTENTION_SHARE
    read = sizes.read_bytes(kind) / (spec.memory_gbps.value * 1e9)
    products = tokens * kind.dense_macs + expansion_macs(mixer, start, tokens, num_ranks)
    return max(2 * products / peak, read), 2 * attention / peak


def expert_products_s(experts: ExpertSizes, spec: GpuSpec, tokens: int, num_experts: float) -> float:
    """One layer's grouped products of ``num_experts`` of its experts. Each one that is touched computes some
    rows for nothing, so few rows an expert cost more each; and its weights are read once.
    """
    share, touched = num_experts / experts.count, distinct_experts(experts, tokens)
    rows = tokens * experts.top_k + assumed.PADDED_ROWS * touched
    rate = spec.bf16_tflops.value * 1e12 * experts.products_share
    read = touched * experts.gpu_bytes / (spec.memory_gbps.value * 1e9)
    return share * max(2 * rows * experts.weights / rate, read)


def copy_s(experts: ExpertSizes, spec: GpuSpec, num_experts: float) -> float:
    """Copying so many experts of a layer over the GPU's link."""
    return num_experts * experts.gpu_bytes / (spec.link_gbps.value * 1e9)


def _exchange_s(sizes: ModelSizes, spec: GpuSpec, tokens: int, num_ranks: int) -> float:
    """All-gather of bf16 hidden states and reduce-scatter of bf16 outputs over the rank's link."""
    num_bytes = 2 * 2 * tokens * sizes.spec.hidden * (num_ranks - 1) / num_ranks
    return num_bytes / (spec.link_gbps.value * 1e9)


def _gpu_layer(
    sizes: ModelSizes,
    spec: GpuSpec,
    gpu: GpuPlacement,
    kind: LayerSizes,
    start: int,
    tokens: int,
    num_ranks: int,
    disk_s: float,
    kv_s: float,
) -> _LayerTime:
    dense, attention = dense_layer_s(sizes, kind, spec, start, tokens, num_ranks)
    experts = kind.experts
    if experts is None:
        return _LayerTime(max(dense + attention, kv_s), kv_s, 0.0, dense, attention, 0.0)
    _, own = rank_share(experts.count, num_ranks, gpu.rank)
    expert = expert_products_s(experts, spec, tokens, own)
    all_own = sum(count * rank_share(one.count, num_ranks, gpu.rank)[1] for count, one in sizes.expert_layers)
    share = gpu.resident_experts / all_own
    streamed = own * (1 - share) if share >= assumed.PLACED_AT_OPENING else own
    touched = distinct_experts(experts, tokens) / experts.count
    dma = copy_s(experts, spec, streamed * touched)
    dma = (max(dma, disk_s * touched) if streamed else 0.0) + kv_s
    ahead = min(1.0, assumed.DMA_GROUPS_AHEAD / gpu.num_groups) if gpu.num_groups else float(kv_s > 0)
    exposed = dma - min(dense + attention, ahead * dma)
    exchange = _exchange_s(sizes, spec, tokens, num_ranks)
    total = dense + attention + exchange + max(expert, exposed)
    return _LayerTime(total, dma, expert, dense, attention, exchange)


def cpu_experts_s(experts: ExpertSizes, hardware: HardwareSpec, tokens: int) -> float:
    """One layer's experts on the CPU: their bytes from RAM once, or their multiply-adds."""
    read = distinct_experts(experts, tokens) * experts.cpu_bytes / (hardware.ram_gbps.value * 1e9)
    macs = tokens * experts.top_k * experts.weights
    return max(read, macs / (hardware.cpu_gmacs.value * 1e9))


def cpu_experts_prefill(
    sizes: ModelSizes, hardware: HardwareSpec, workload: Workload, batch_tokens: int
) -> Prefill:
    """Dense part on the first GPU, experts on the CPU: what a short prompt may prefer."""

    def layer_time(kind: LayerSizes, start: int, tokens: int) -> _LayerTime:
        dense, attention = dense_layer_s(sizes, kind, hardware.gpus[0], start, tokens, 1)
        if kind.experts is None:
            return _LayerTime(dense + attention, 0.0, 0.0, dense, attention, 0.0)
        expert = cpu_experts_s(kind.experts, hardware, tokens)
        total = dense + attention + expert + assumed.HANDOVER_S
        return _LayerTime(total, 0.0, expert, dense, attention, assumed.HANDOVER_S)

    return _prefill("cpu", sizes, workload, batch_tokens, layer_time)


def cpu_prefill(sizes: ModelSizes, hardware: HardwareSpec, workload: Workload, batch_tokens: int) -> Prefill:
    """Everything on the CPU, in batches."""
    rate = hardware.cpu_gmacs.value * 1e9

    def layer_time(kind: LayerSizes, start: int, tokens: int) -> _LayerTime:
        read = sizes.read_bytes(kind) / (hardware.ram_gbps.value * 1e9)
        dense = max(tokens * kind.dense_macs / rate, read)
        attention = mixer_macs(kind.layer.mixer, start, tokens) / (rate * assumed.ATTENTION_CPU_SHARE)
        expert = cpu_experts_s(kind.experts, hardware, tokens) if kind.experts is not None else 0.0
        return _LayerTime(dense + attention + expert, 0.0, expert, dense, attention, 0.0)

    return _prefill("cpu", sizes, workload, batch_tokens, layer_time)


def decode(
    sizes: ModelSizes, hardware: HardwareSpec, workload: Workload, gpus: Sequence[GpuPlacement]
) -> Decode:
    """One token after the prompt. GPU 0 (the CPU without one) reads dense weights and KV, every GPU the
    experts that it holds, the CPU the others, all at once. Without CPU experts the routed ones are streamed.
    Keys and values in RAM come over the link meanwhile.
    """
    ram = hardware.ram_gbps.value * 1e9 * assumed.MEMORY_READ_EFFICIENCY
    rates = [_decode_rate(hardware.gpus[gpu.rank]) for gpu in gpus]
    memory = rates[0] if gpus else ram
    num_cold = sizes.num_experts - sum(gpu.resident_experts for gpu in gpus)
    routed = [(count * one.top_k / sizes.num_experts, one) for count, one in sizes.expert_layers]
    cpu_bytes = sum(share * num_cold * one.cpu_bytes for share, one in routed) if num_cold > 0 else 0.0
    hot_bytes = sum(
        share * one.gpu_bytes for share, one in routed
    )  # of an expert in VRAM, as often as it is hit
    seconds = (gpu.resident_experts * hot_bytes / rate for gpu, rate in zip(gpus, rates, strict=True))
    gpu_s = max(seconds, default=0.0)
    stream_s = 0.0 if sizes.cpu_expert_bytes else _stream_routed_s(sizes, hardware, gpus)
    handover = _between_s(sizes, on_gpu=bool(gpus), on_cpu=cpu_bytes > 0 or not gpus)
    if len(gpus) > 1:
        late = assumed.LATE_RANKS_S if cpu_bytes else 0.0
        handover += sizes.num_expert_layers * (assumed.RANKS_LAYER_S + late)
    kv_bytes = sizes.kv_bytes(workload.prompt_tokens, workload.kv_dtype)
    host_kv_bytes = read_bytes(sizes, workload, workload.prompt_tokens) if gpus else 0
    host_kv_s = 0.0
    if host_kv_bytes:
        link = hardware.gpus[gpus[0].rank].link_gbps.value * 1e9
        host_kv_s = host_kv_bytes / (link * assumed.MEMORY_READ_EFFICIENCY)
    dense_s, kv_s = sizes.dense_bytes / memory, (kv_bytes - host_kv_bytes) / memory
    cpu_s = cpu_bytes / ram + (sizes.num_expert_layers * assumed.CPU_EXPERTS_LAYER_S if cpu_bytes else 0.0)
    if cpu_s:  # read ahead meanwhile, of the same RAM
        experts_s = max(cpu_s + host_kv_bytes / ram, gpu_s, host_kv_s)
    else:
        experts_s = max(gpu_s, stream_s) + host_kv_s
    total = dense_s + kv_s + experts_s + handover
    return Decode(
        total, 1 / total, dense_s, kv_s, cpu_s, gpu_s, handover, round(cpu_bytes), stream_s,
        host_kv_s, host_kv_bytes,
    )  # fmt: skip


def _between_s(sizes: ModelSizes, *, on_gpu: bool, on_cpu: bool) -> float:
    """What all layers of a token take besides reading: hand-overs, or what each side alone needs."""
    if on_gpu and on_cpu:
        return sizes.num_expert_layers * (assumed.HANDOVER_S + assumed.LATE_LAYER_S)
    each = assumed.GPU_DECODE_LAYER_S if on_gpu else assumed.CPU_DENSE_LAYER_S
    return len(sizes.spec.layers) * each


def _decode_rate(gpu: GpuSpec) -> float:
    """Bytes a second that decode kernels read of its memory."""
    return min(gpu.memory_gbps.value * assumed.MEMORY_READ_EFFICIENCY, assumed.GPU_DECODE_GBPS) * 1e9


def _stream_routed_s(sizes: ModelSizes, hardware: HardwareSpec, gpus: Sequence[GpuPlacement]) -> float:
    """One token's experts that are not in VRAM, each rank's over its own link."""

    def one_rank(gpu: GpuPlacement) -> float:
        seconds = 0.0
        for count, experts in sizes.expert_layers:
            _, own = rank_share(experts.count, len(gpus), gpu.rank)
            chosen = count * experts.top_k / experts.count * own
            hit = count * experts.top_k * gpu.resident_experts / sizes.num_experts
            seconds += copy_s(experts, hardware.gpus[gpu.rank], max(0.0, chosen - hit))
        return seconds

    return max((one_rank(gpu) for gpu in gpus), default=0.0)


def start_up(
    sizes: ModelSizes, hardware: HardwareSpec, gpus: Sequence[GpuPlacement], host: HostPlacement
) -> StartUp:
    """Starting the processes, and reading what must be in place before the first prompt while pinned memory
    is registered; CPU experts are mapped and cost nothing once cached.
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
    arena = 2 * host.pinned_bytes / ram if host.expert_store == "arena" else 0.0
    uploaded = sum(gpu.resident_bytes for gpu in gpus) if host.expert_store == "none" else 0
    dense = sizes.dense_bytes + sizes.embedding_bytes
    from_disk = dense + host.cpu_experts_bytes + host.pinned_bytes + host.page_cache_bytes + uploaded
    pinned = (host.pinned_bytes + uploaded) / max(len(gpus), 1) / (assumed.PIN_GBPS * 1e9)
    warm = _processes_s(len(gpus)) + max(to_gpu, pinned) + arena
    return StartUp(cold_s=max(from_disk / disk, warm), warm_s=warm)


def _processes_s(num_gpus: int) -> float:
    """Until the processes have opened a bundle of no bytes."""
    cuda_s = assumed.CUDA_START_S if num_gpus else 0.0
    return assumed.PROCESS_START_S + cuda_s + (assumed.RANKS_START_S if num_gpus > 1 else 0.0)
