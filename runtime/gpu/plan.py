"""The plan of the machine the runtime is on: what the planner needs to know is taken from the device and the
host.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import NativeError, ResourceError
from krasis.runtime.context_size import LEAST_TOKENS, tokens_in_vram
from krasis.runtime.device.api import Device
from krasis.runtime.gpu.parallel import Parallel
from krasis.runtime.host import environment
from krasis.runtime.host.measure_gpu import measured_spec
from krasis.runtime.planning.hardware import Figure, GpuSpec, HardwareSpec, describe_gpu, describe_host
from krasis.runtime.planning.planner import make_plan
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
    hardware = describe_machine(device, settings, parallel)
    slots = slots_of(settings)
    fitting = tokens_in_vram(sizes, hardware.gpus[0].vram_bytes, settings.gpu_dtype)
    capacity = settings.context_for(sizes.shape.max_context, max(LEAST_TOKENS, fitting // slots))
    sequence = sizes.sequence_bytes(capacity, settings.gpu_dtype, "whole")
    hardware = _without_slots(hardware, (slots - 1) * sequence)
    # Nothing is known of the prompts to come: the longest is planned for (docs/PLANNING.md says why), or a
    # chunk where the settings cut prompts.
    prompt = min(capacity, MOST_PASS_TOKENS, settings.prefill_chunk or MOST_PASS_TOKENS)
    workload = Workload(capacity, prompt, settings.gpu_dtype)
    plan = make_plan(sizes, hardware, workload)
    batch = parallel.agree(plan.batch_tokens)
    return GpuPlan(sizes, hardware, workload, batch, plan.gpus[parallel.rank])


def slots_of(settings: EngineSettings) -> int:
    """Sequences at once."""
    return settings.slots


def _without_slots(hardware: HardwareSpec, num_bytes: int) -> HardwareSpec:
    """The machine without the memory of further sequences' keys and values."""
    if num_bytes == 0:
        return hardware
    gpus = tuple(replace(gpu, vram_bytes=max(1, gpu.vram_bytes - num_bytes)) for gpu in hardware.gpus)
    return replace(hardware, gpus=gpus)


def describe_machine(device: Device, settings: EngineSettings, parallel: Parallel) -> HardwareSpec:
    """This host, and as many GPUs like this one as there are ranks: all ranks plan alike, for the least free
    VRAM and the slowest rates.
    """
    gpu = _rates(device)
    if device.torch_device.type == "cuda":
        from krasis.runtime.device.cuda import release_library_memory

        # The measurement's; the plan's reserve has room for this engine's.
        release_library_memory(device.torch_device.index or 0)
    free = device.free_bytes()
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
