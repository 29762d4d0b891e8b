"""Opens what a GPU backend is made of, in the order of the plan; what was opened is closed if a later part
fails."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from krasis.formats.bundle.reader import Bundle
from krasis.formats.native import Pool
from krasis.formats.process.stages import stage
from krasis.formats.units import format_bytes
from krasis.runtime.cpu.factors import without_factors
from krasis.runtime.cpu.weights import load_weights
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.blocks.table import Blocks, blocks_of
from krasis.runtime.gpu.buffers import Workspace
from krasis.runtime.gpu.decode import HybridDecoder
from krasis.runtime.gpu.experts.cpu_experts import CpuExperts
from krasis.runtime.gpu.experts.host_experts import CpuTier
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.gpu.experts.schedule import NUM_BUFFERS
from krasis.runtime.gpu.experts.streamed_experts import StreamedExperts, Streaming
from krasis.runtime.gpu.hashed_tables import open_tables
from krasis.runtime.gpu.host_kv import host_kv_memory
from krasis.runtime.gpu.kernels.dtypes import GPU_DTYPES
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from krasis.runtime.gpu.kernels.many_rows import ManyRows
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.memory import OUT_OF_MEMORY, largest_workspace
from krasis.runtime.gpu.model import GpuModel
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.gpu.parallel_decode import RankLink
from krasis.runtime.gpu.parallel_follower import RankFollower
from krasis.runtime.gpu.parallel_opening import open_decode_ranks
from krasis.runtime.gpu.plan import GpuPlan, plan_gpu, slots_of
from krasis.runtime.gpu.weights import load_gpu_weights
from krasis.runtime.host.environment import probe_memory
from krasis.runtime.host_memory import ExpertStore, open_store
from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning.host import host_reserve_bytes
from krasis.runtime.planning.host_kv import host_layers
from krasis.runtime.planning.kv_form import gpu_windows
from krasis.runtime.planning.shape import AnyModel, shape_of
from krasis.runtime.planning.sums import exact_tokens
from krasis.runtime.planning.workspace import SCRATCH_BYTES
from krasis.runtime.settings import EngineSettings

logger = logging.getLogger(__name__)

CPU_STAGE_TOKENS = 512
"""A prompt of more is never faster on the CPU's experts: it touches nearly all of them, and streaming reads
half the bytes.
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a backend computes with. cpu, decoder: None where there are no CPU experts, or on ranks above 0 (a
    decoder exists without them if all experts are in VRAM). ranks: this one's part in tokens that several
    decode, None if rank 0 decodes alone. closing: frees everything."""

    model: GpuModel
    blocks: Blocks
    plan: GpuPlan
    store: ExpertStore
    workspace: Workspace
    residency: Residency | None
    streamed: StreamedExperts
    cpu: CpuExperts | None
    decoder: HybridDecoder | None
    ranks: RankLink | RankFollower | None
    closing: ExitStack


def open_parts(bundle: Bundle, settings: EngineSettings, device: Device, parallel: Parallel) -> Parts:
    """Raises MismatchError without GPU experts, ResourceError for what does not fit."""
    with stage("measure the GPU, plan"):
        plan = plan_gpu(bundle, device, settings, parallel)
    _log_plan(plan)
    with ExitStack() as undo:
        host_kv = host_kv_memory(device, bundle.spec, plan)
        with stage("choose where experts are pinned"):
            store = _open_store(bundle, device, plan, parallel)
        undo.callback(store.close)
        with stage("dense weights to the GPU"):
            model = _open_model(bundle, settings, device, plan, host_kv)
        spec, copy = model.spec, device.stream("copy")
        blocks = blocks_of(model)
        layout, record = model.weights.expert_layout, model.weights.record
        exact = parallel.agree(exact_tokens(spec, parallel.num_ranks, _streamed_share(plan, spec)))
        workspace = largest_workspace(device, spec, model.dtype, plan.batch_tokens, parallel.num_ranks, exact)
        with stage("room for experts on the GPU"):
            residency, staging = _open_expert_memory(model, plan, store, copy)
        if residency is not None:
            undo.callback(residency.close)
        product = ExpertProduct(model.kernels, spec, layout, record, model.expert_forms())
        streaming = Streaming(store, copy, staging, residency)
        streamed = StreamedExperts(device, spec, product, streaming, parallel)
        ranks = open_decode_ranks(model, product, residency, parallel, "cpu" in bundle.manifest.layouts)
        if isinstance(ranks, RankFollower):
            undo.callback(ranks.close)
        cpu = decoder = None
        if parallel.rank == 0:
            link = ranks if isinstance(ranks, RankLink) else None
            with stage("CPU experts, decoder"):
                cpu, decoder = _open_cpu(
                    bundle, settings, model, blocks, product, residency, workspace, link, undo
                )
        made = undo.pop_all()
        return Parts(model, blocks, plan, store, workspace, residency, streamed, cpu, decoder, ranks, made)


def _streamed_share(plan: GpuPlan, model: AnyModel) -> float:
    """Of this rank's experts, those that every pass copies. Where fewer than half have a place, none do in
    the first."""
    gpu = plan.placement
    share = gpu.resident_experts / (shape_of(model).num_expert_layers * gpu.num_experts)
    if gpu.num_groups == 0:
        return 0.0
    return 1.0 - share if share >= assumed.PLACED_AT_OPENING else 1.0


def _open_store(bundle: Bundle, device: Device, plan: GpuPlan, parallel: Parallel) -> ExpertStore:
    return open_store(
        bundle,
        device,
        first_expert=parallel.first_expert,
        num_experts=parallel.num_experts,
        group_experts=_group_experts(plan),
        ram_limit_bytes=_ram_share(plan, parallel),
    )


def _open_model(
    bundle: Bundle, settings: EngineSettings, device: Device, plan: GpuPlan, host_kv: torch.Tensor | None
) -> GpuModel:
    dtype, capacity, slots = GPU_DTYPES[settings.gpu_dtype], plan.workload.context, slots_of(settings)
    stream = device.stream("compute")
    kernels = GpuKernels(device)
    mapped = without_factors(load_weights(bundle, "gpu"))
    spec, weights = mapped.spec, load_gpu_weights(mapped, device, stream, capacity)
    return GpuModel(
        spec=spec,
        device=device,
        kernels=kernels,
        many_rows=ManyRows(kernels, _scratch(device)),
        weights=weights,
        cache=GpuKvCache(
            device,
            stream,
            spec,
            capacity,
            dtype,
            slots,
            eight_bits=plan.workload.kv_dtype == "int8",
            host_layers=host_layers(spec, plan.placement.host_kv_layers),
            host_memory=host_kv,
            rings=gpu_windows(spec, len(plan.hardware.gpus)) == "rings",
        ),
        dtype=dtype,
        stream=stream,
        tables=open_tables(mapped, device, dtype, slots, capacity),
    )


def _scratch(device: Device) -> torch.Tensor | None:
    """Room for the weights of a library's product; the double has no such library."""
    if device.torch_device.type != "cuda":
        return None
    return device.empty((SCRATCH_BYTES,), torch.uint8)


def _open_expert_memory(
    model: GpuModel, plan: GpuPlan, store: ExpertStore, copy: Stream
) -> tuple[Residency | None, torch.Tensor]:
    """Resident experts and the two staging buffers [2, places, record_bytes], as planned or smaller where
    memory is short of the plan. Raises OutOfDeviceMemoryError if not even a buffer of one expert fits."""
    device, num_own = model.device, model.shape.num_expert_layers * store.num_experts
    if plan.placement.num_groups == 0:
        residency = _open_residency(model, store, copy, num_own, least=num_own)
        if residency is not None:
            residency.fill(model.stream)
            return residency, device.empty((NUM_BUFFERS, 0, store.record_bytes), torch.uint8)
        logger.warning("the experts do not all fit in VRAM as planned: they are streamed")
    places = _group_experts(plan)
    while True:
        try:
            staging = device.empty((NUM_BUFFERS, places, store.record_bytes), torch.uint8)
            break
        except OUT_OF_MEMORY as error:
            if places == 1:
                raise
            places //= 2
            logger.warning(
                "no GPU memory for the planned expert buffers, trying %d experts: %s", places, error
            )
    residency = _open_residency(model, store, copy, min(plan.placement.resident_experts, num_own))
    # A few places wait for the experts that turn out to be hot. Where most experts have one, waiting would
    # cost more: they arrive a few a token.
    if residency is not None and 2 * residency.num_slots >= num_own:
        residency.fill(model.stream)
    return residency, staging


def _open_residency(
    model: GpuModel, store: ExpertStore, copy: Stream, wanted: int, least: int = 1
) -> Residency | None:
    """As many slots as are wanted and fit beside what operators need. None below least."""
    shape, device = model.shape, model.device
    room = (device.free_bytes() - assumed.GPU_OPERATORS_BYTES) // store.record_bytes
    slots = min(wanted, room)
    while slots >= least:
        try:
            return Residency(device, store, copy, shape.num_expert_layers, shape.num_experts, slots)
        except OUT_OF_MEMORY as error:
            logger.warning("no GPU memory for %d resident experts: %s", slots, str(error))
            slots = slots * 7 // 8
    return None


def _open_cpu(
    bundle: Bundle,
    settings: EngineSettings,
    model: GpuModel,
    blocks: Blocks,
    product: ExpertProduct,
    residency: Residency | None,
    workspace: Workspace,
    ranks: RankLink | None,
    undo: ExitStack,
) -> tuple[CpuExperts | None, HybridDecoder | None]:
    tier = None
    if "cpu" in bundle.manifest.layouts:
        pool = Pool(settings.threads, settings.isa)
        undo.callback(pool.close)
        tier = CpuTier(load_weights(bundle, "cpu"), pool)
    cpu = None
    if tier is not None:
        most = min(CPU_STAGE_TOKENS, workspace.max_tokens)
        cpu = CpuExperts(model.device, model.kernels, product, model.spec, tier, residency, most)
    is_complete = ranks.is_complete if ranks is not None else residency is not None and residency.is_complete
    if tier is None and not is_complete:
        logger.info("no CPU experts: a token is decoded by a prefill of one token, its experts streamed")
        return None, None
    slots = model.cache.num_slots
    decoder = HybridDecoder(model, product, tier, residency, blocks=blocks, max_rows=slots, ranks=ranks)
    undo.callback(decoder.close)
    return cpu, decoder


def _group_experts(plan: GpuPlan) -> int:
    """Places of a staging buffer, should one be needed."""
    gpu = plan.placement
    return gpu.group_experts or min(gpu.num_experts, assumed.PREFERRED_GROUP_EXPERTS)


def _ram_share(plan: GpuPlan, parallel: Parallel) -> int | None:
    """What this rank may pin where several share a host and its RAM; None: the store finds out."""
    if parallel.num_local_ranks == 1:
        return None
    memory = probe_memory()
    free = memory.available_bytes - host_reserve_bytes(memory.limit_bytes) - plan.sizes.cpu_experts_bytes
    return max(0, free) // parallel.num_local_ranks


def _log_plan(plan: GpuPlan) -> None:
    gpu = plan.placement
    sizes = (gpu.dense_bytes, gpu.kv_bytes, gpu.workspace_bytes, gpu.buffer_bytes, gpu.vram_bytes)
    logger.info(
        "GPU plan: %d tokens a pass, %d groups of %d experts a layer, room for %d resident experts; "
        "dense %s, KV %s, workspace %s, buffers %s of %s",
        plan.batch_tokens,
        gpu.num_groups,
        gpu.group_experts,
        gpu.resident_experts,
        *(format_bytes(size) for size in sizes),
    )
