"""The plan of the machine the runtime is on: what the planner needs to know is taken from the device and the
host.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import NativeError, ResourceError, UsageError
from krasis.runtime.context_size import LEAST_TOKENS, tokens_in_vram
from krasis.runtime.device.api import Device
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.host import environment
from krasis.runtime.host.measure_gpu import measured_spec
from krasis.runtime.missing_kernels import refuse_ranks
from krasis.runtime.planning import assumptions
from krasis.runtime.planning.hardware import Figure, GpuSpec, HardwareSpec, describe_gpu, describe_host
from krasis.runtime.planning.host_kv import movable_layers
from krasis.runtime.planning.kv_form import gpu_kv_dtype
from krasis.runtime.planning.planner import make_plan
from krasis.runtime.planning.report import kv_in_ram_words
from krasis.runtime.planning.sizes import ModelSizes, sizes_of_bundle
from krasis.runtime.planning.types import GpuPlacement, Workload
from krasis.runtime.settings import EngineSettings

logger = logging.getLogger(__name__)

MOST_PASS_TOKENS = 32768
"""A pass of more is bound by compute on any GPU (two passes then cost no more), and its activations take the
VRAM of hot experts.
"""


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """batch_tokens: of one pass, on all ranks together. placement: of this rank's VRAM."""

    sizes: ModelSizes
    hardware: HardwareSpec
    workload: Workload
    batch_tokens: int
    placement: GpuPlacement


def plan_gpu(bundle: Bundle, device: Device, settings: EngineSettings, parallel: Parallel) -> GpuPlan:
    """Raises ResourceError with the numbers if the model does not fit."""
    sizes = sizes_of_bundle(bundle.manifest)
    refuse_ranks(sizes.spec, parallel.num_ranks)
    hardware = describe_machine(device, settings, parallel)
    slots = slots_of(settings)
    kv_dtype = gpu_kv_dtype(sizes.spec, settings.kv_dtype, settings.gpu_dtype)
    fitting = tokens_in_vram(sizes, hardware.gpus[0].vram_bytes, kv_dtype, parallel.num_ranks)
    capacity = settings.context_for(sizes.spec.max_context, max(LEAST_TOKENS, fitting // slots))
    # Nothing is known of the prompts to come: the longest is planned for (docs/PLANNING.md says why), or a
    # chunk where the settings cut prompts.
    prompt = min(capacity, MOST_PASS_TOKENS, settings.prefill_chunk or MOST_PASS_TOKENS)
    asked = min(settings.host_kv_layers, len(movable_layers(sizes.spec)))
    if asked and parallel.num_ranks > 1:
        raise UsageError(
            "keys and values in RAM are for one GPU", where="host_kv_layers", got=parallel.num_ranks, limit=1
        )
    plan = make_plan(sizes, hardware, Workload(capacity, prompt, kv_dtype, slots, asked))
    if plan.workload.host_kv_layers > asked:
        logger.warning(
            "VRAM has no room for keys and values of %s tokens; in RAM are those %s",
            f"{capacity:,}", kv_in_ram_words(plan),
        )  # fmt: skip
    batch = parallel.agree(plan.batch_tokens)
    return GpuPlan(sizes, hardware, plan.workload, batch, plan.gpus[parallel.rank])


def slots_of(settings: EngineSettings) -> int:
    """Sequences at once."""
    return settings.slots


def describe_machine(device: Device, settings: EngineSettings, parallel: Parallel) -> HardwareSpec:
    """This host, and as many GPUs like this one as there are ranks: all ranks plan alike, for the least free
    VRAM and the slowest rates.
    """
    gpu = _rates(device)
    if device.torch_device.type == "cuda":
        from krasis.runtime.device.cuda import release_library_memory

        # The measurement's; the plan's reserve has room for this engine's.
        release_library_memory(device.torch_device.index or 0)
    free = device.free_bytes() + _counted_twice_bytes(device, settings, parallel)
    usable = free if settings.vram_bytes is None else min(free, settings.vram_bytes)
    gpu = replace(_agreed(gpu, parallel), vram_bytes=parallel.agree(usable))
    cpu, memory = environment.probe_cpu(), environment.probe_memory()
    if not cpu.isa:
        raise NativeError("no CPU kernels run on this machine", got=cpu.isa_reason)
    return describe_host(
        (gpu,) * parallel.num_ranks,
        ram_bytes=Figure(memory.limit_bytes, "measured", memory.limit_reason),
        num_cores=Figure(settings.threads or cpu.num_cpus, "measured", "CPUs of this process"),
        isa=cpu.isa,
    )


def _counted_twice_bytes(device: Device, settings: EngineSettings, parallel: Parallel) -> int:
    """What the plan's reserve has for a CUDA context that is there already: memory is free beside it."""
    # Without a limit nothing was counted for what several ranks' NCCL takes later: the reserve stays whole.
    if device.torch_device.type != "cuda" or (settings.vram_bytes is None and parallel.num_ranks > 1):
        return 0
    return assumptions.GPU_RESERVE_BYTES - assumptions.GPU_OPERATORS_BYTES


def _rates(device: Device) -> GpuSpec:
    """Measured, or, on the double and where nothing can be measured, assumed from the size."""
    index, assumed = device.torch_device.index, describe_gpu(device.total_bytes)
    if device.torch_device.type != "cuda":
        return assumed
    try:
        return measured_spec(index or 0, device.total_bytes)
    except ResourceError as error:
        logger.warning("the GPU's rates are assumed, not measured: %s", error)
        return assumed


def _agreed(gpu: GpuSpec, parallel: Parallel) -> GpuSpec:
    """The lowest rate of all ranks' measurements, each to a thousandth of its unit."""

    def lowest(figure: Figure) -> Figure:
        return replace(figure, value=max(1, parallel.agree(round(figure.value * 1000))) / 1000)

    return replace(
        gpu,
        link_gbps=lowest(gpu.link_gbps),
        memory_gbps=lowest(gpu.memory_gbps),
        bf16_tflops=lowest(gpu.bf16_tflops),
    )
