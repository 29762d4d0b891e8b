"""The planner: a pure function of (model, hardware, workload). It allocates nothing and measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.errors import ResourceError, UsageError
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning import cost
from krasis.runtime.planning.hardware import HardwareSpec
from krasis.runtime.planning.host import cpu_workspace_bytes, place_on_host
from krasis.runtime.planning.placement import (
    GpuPlacements,
    gpu_workspace_bytes,
    place_resident,
    place_streamed,
)
from krasis.runtime.planning.sizes import ModelSizes
from krasis.runtime.planning.types import HostPlacement, Plan, Prefill, Workload

DEFAULT_PROMPT_TOKENS = 10_000
ANSWER_TOKENS = 2048


def make_workload(
    spec: ModelSpec,
    *,
    context: int | None = None,
    prompt_tokens: int | None = None,
    kv_dtype: str = "f16",
) -> Workload:
    """A workload with defaults cut to the model's positions: a prompt of 10,000 tokens and 2,048 more of
    context.

    Raises UsageError if a given figure is not positive, the prompt exceeds the context, or the context the
    model.
    """
    longest = spec.max_context
    for name, value in (("--context", context), ("--prompt-tokens", prompt_tokens)):
        if value is not None and not 1 <= value <= longest:
            raise UsageError("out of range for this model", where=name, got=value, limit=f"1 to {longest}")
    prompt = prompt_tokens or min(DEFAULT_PROMPT_TOKENS, context or longest)
    context = context or min(longest, prompt + ANSWER_TOKENS)
    if prompt > context:
        raise UsageError("the prompt is longer than the context", got=prompt, limit=context)
    return Workload(context, prompt, kv_dtype)


def make_plan(sizes: ModelSizes, hardware: HardwareSpec, workload: Workload) -> Plan:
    """What this hardware would do with the model. Raises ResourceError with the numbers if it does not
    fit.
    """
    if hardware.gpus:
        chosen = _choose_on_gpus(sizes, hardware, workload)
    else:
        placed = GpuPlacements(min(assumed.CPU_PREFILL_BATCH, workload.prompt_tokens), ())
        host = place_on_host(sizes, hardware, workload, placed.batch_tokens, ())
        prefill = cost.cpu_prefill(sizes, hardware, workload, placed.batch_tokens)
        chosen = _Alternative(placed, host, prefill)
    gpus, host, prefill = chosen.placed.gpus, chosen.host, chosen.prefill
    if gpus and host.cpu_experts_bytes:
        on_cpu = cost.cpu_experts_prefill(sizes, hardware, workload, chosen.placed.batch_tokens)
        prefill = min(prefill, on_cpu, key=lambda one: one.total_s)
    return Plan(
        sizes=sizes,
        hardware=hardware,
        workload=workload,
        batch_tokens=chosen.placed.batch_tokens,
        gpus=gpus,
        host=host,
        prefill=prefill,
        decode=cost.decode(sizes, hardware, workload, gpus),
        start_up=cost.start_up(sizes, hardware, gpus, host),
    )


@dataclass(frozen=True, slots=True)
class _Alternative:
    """One way to place the model, and what prefill then takes."""

    placed: GpuPlacements
    host: HostPlacement
    prefill: Prefill


def _choose_on_gpus(sizes: ModelSizes, hardware: HardwareSpec, workload: Workload) -> _Alternative:
    """All experts in VRAM, or the largest batch and as many experts as fit beside it: what answers sooner,
    the prompt and TYPICAL_ANSWER_TOKENS taken together.
    """
    resident = place_resident(sizes, hardware.gpus, workload)
    if resident is None:
        return _evaluate(sizes, hardware, workload, place_streamed(sizes, hardware.gpus, workload))
    all_in = _evaluate(sizes, hardware, workload, resident)
    # Without CPU experts, decode would copy what a token chose, layer by layer.
    if resident.batch_tokens == workload.prompt_tokens or sizes.cpu_expert_bytes == 0:
        return all_in
    try:
        placed = place_streamed(sizes, hardware.gpus, workload)
        some_in = _evaluate(sizes, hardware, workload, placed)
    except ResourceError:  # streamed experts need RAM, resident ones do not
        return all_in
    return min(all_in, some_in, key=lambda one: _answer_s(sizes, hardware, workload, one))


def _answer_s(sizes: ModelSizes, hardware: HardwareSpec, workload: Workload, one: _Alternative) -> float:
    """Seconds until a typical answer to the prompt is complete."""
    token = cost.decode(sizes, hardware, workload, one.placed.gpus)
    return one.prefill.total_s + assumed.TYPICAL_ANSWER_TOKENS * token.total_s


def _evaluate(
    sizes: ModelSizes, hardware: HardwareSpec, workload: Workload, placed: GpuPlacements
) -> _Alternative:
    host = place_on_host(sizes, hardware, workload, placed.batch_tokens, placed.gpus)
    prefill = cost.gpu_prefill(sizes, hardware, workload, placed.batch_tokens, placed.gpus, host)
    return _Alternative(placed, host, prefill)


def least_vram_bytes(sizes: ModelSizes, workload: Workload) -> int:
    """The smallest single GPU that can run this: dense weights, KV cache, reserve, two one-expert buffers,
    the least batch.
    """
    batch = min(workload.prompt_tokens, assumed.MIN_PREFILL_BATCH)
    kept = sizes.sequence_bytes(workload.context, workload.kv_dtype, "whole")
    fixed = assumed.GPU_RESERVE_BYTES + sizes.dense_bytes + kept
    return fixed + 2 * sizes.gpu_expert_bytes + gpu_workspace_bytes(sizes.largest, batch, 1)


def whole_layer_vram_bytes(sizes: ModelSizes, workload: Workload) -> int:
    """The smallest single GPU that takes a layer in one group and the prompt in one pass."""
    kept = sizes.sequence_bytes(workload.context, workload.kv_dtype, "whole")
    fixed = assumed.GPU_RESERVE_BYTES + sizes.dense_bytes + kept
    layer = sizes.most_experts * sizes.gpu_expert_bytes
    return fixed + 2 * layer + gpu_workspace_bytes(sizes.largest, workload.prompt_tokens, 1)


def cpu_ram_bytes(sizes: ModelSizes, workload: Workload) -> int:
    """RAM that a machine without a GPU needs, without the system's reserve."""
    batch = min(assumed.CPU_PREFILL_BATCH, workload.prompt_tokens)
    kept = sizes.dense_bytes + sizes.embedding_bytes + sizes.cpu_experts_bytes
    sequence = sizes.sequence_bytes(workload.context, workload.kv_dtype, "rings")
    return kept + sequence + cpu_workspace_bytes(sizes.largest, batch)
