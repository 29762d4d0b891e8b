"""The planner: a pure function of (model, hardware, workload). It allocates nothing and measures nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from krasis.formats.errors import ResourceError, UsageError
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning import cost
from krasis.runtime.planning.hardware import HardwareSpec
from krasis.runtime.planning.host import cpu_workspace_bytes, place_on_host
from krasis.runtime.planning.host_kv import counts_to_try, with_host_layers
from krasis.runtime.planning.kv_form import planned_kv_dtype
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
        workload = replace(workload, kv_dtype=planned_kv_dtype(sizes.spec, workload.kv_dtype))
        workload, chosen = _with_room_for_kv(sizes, hardware, workload)
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


def _with_room_for_kv(
    sizes: ModelSizes, hardware: HardwareSpec, workload: Workload
) -> tuple[Workload, _Alternative]:
    """As asked; where that does not fit in one GPU's VRAM, with the keys and values of some layers in RAM: of
    so many as answer soonest. (The more, the larger a pass can be and the slower is each token.)"""
    try:
        return workload, _choose_on_gpus(sizes, hardware, workload)
    except ResourceError as error:
        if len(hardware.gpus) > 1:  # each has the whole cache, and other ranks' rows come into it
            raise
        first = last = error
    found: list[tuple[Workload, _Alternative]] = []
    for count in counts_to_try(sizes.spec):
        moved = with_host_layers(workload, count)
        if count <= workload.host_kv_layers:
            continue
        try:
            found.append((moved, _choose_on_gpus(sizes, hardware, moved)))
        except ResourceError as error:
            last = error
    if not found:
        raise first if last.where.startswith("GPU") else last
    return min(found, key=lambda one: _answer_s(sizes, hardware, *one))


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


def least_vram_bytes(sizes: ModelSizes, workload: Workload, num_gpus: int = 1) -> int:
    """The smallest GPU of so many that can run this: dense weights, KV cache, reserve, two one-expert
    buffers, the least batch.
    """
    batch = min(workload.prompt_tokens, assumed.MIN_PREFILL_BATCH)
    kept = sizes.gpu_kv_bytes(workload.context, workload.kv_dtype, num_gpus)
    fixed = assumed.GPU_RESERVE_BYTES + sizes.dense_bytes + kept
    return fixed + 2 * sizes.gpu_expert_bytes + gpu_workspace_bytes(sizes.largest, batch, num_gpus)


def whole_layer_vram_bytes(sizes: ModelSizes, workload: Workload) -> int:
    """The smallest single GPU that takes a layer in one group and the prompt in one pass."""
    kept = sizes.gpu_kv_bytes(workload.context, workload.kv_dtype)
    fixed = assumed.GPU_RESERVE_BYTES + sizes.dense_bytes + kept
    layer = sizes.most_experts * sizes.gpu_expert_bytes
    return fixed + 2 * layer + gpu_workspace_bytes(sizes.largest, workload.prompt_tokens, 1)


def cpu_ram_bytes(sizes: ModelSizes, workload: Workload) -> int:
    """RAM that a machine without a GPU needs, without the system's reserve."""
    batch = min(assumed.CPU_PREFILL_BATCH, workload.prompt_tokens)
    kept = sizes.dense_bytes + sizes.embedding_bytes + sizes.cpu_experts_bytes
    sequence = sizes.sequence_bytes(workload.context, workload.kv_dtype, "rings")
    return kept + sequence + cpu_workspace_bytes(sizes.largest, batch)
