"""The planner: a pure function of (model, hardware, workload). It allocates nothing and measures nothing."""

from __future__ import annotations

from krasis.formats.architecture import Architecture
from krasis.formats.errors import UsageError
from krasis.runtime.planning import assumptions as assumed
from krasis.runtime.planning import cost
from krasis.runtime.planning.hardware import HardwareSpec
from krasis.runtime.planning.host import place_on_host
from krasis.runtime.planning.placement import gpu_workspace_bytes, place_on_gpus
from krasis.runtime.planning.sizes import ModelSizes
from krasis.runtime.planning.types import Plan, Prefill, Workload

DEFAULT_PROMPT_TOKENS = 10_000
ANSWER_TOKENS = 2048


def make_workload(
    arch: Architecture, *, context: int | None = None, prompt_tokens: int | None = None, kv_dtype: str = "f16"
) -> Workload:
    """A workload with defaults cut to the model's positions: a prompt of 10,000 tokens and 2,048 more of
    context.

    Raises UsageError if a given figure is not positive, the prompt exceeds the context, or the context the
    model.
    """
    longest = arch.max_positions
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
        batch, gpus = place_on_gpus(sizes, hardware.gpus, workload)
    else:
        batch, gpus = min(assumed.CPU_PREFILL_BATCH, workload.prompt_tokens), ()
    host = place_on_host(sizes, hardware, workload, batch, gpus)
    if gpus:
        prefill = cost.gpu_prefill(sizes, hardware, workload, batch, gpus, host)
        if host.cpu_experts_bytes:
            on_cpu = cost.cpu_experts_prefill(sizes, hardware, workload, batch)
            prefill = min(prefill, on_cpu, key=_seconds)
    else:
        prefill = cost.cpu_prefill(sizes, hardware, workload, batch)
    return Plan(
        sizes=sizes,
        hardware=hardware,
        workload=workload,
        batch_tokens=batch,
        gpus=gpus,
        host=host,
        prefill=prefill,
        decode=cost.decode(sizes, hardware, workload, gpus),
        start_up=cost.start_up(sizes, hardware, gpus, host),
    )


def _seconds(prefill: Prefill) -> float:
    return prefill.total_s


def least_vram_bytes(sizes: ModelSizes, workload: Workload) -> int:
    """The smallest single GPU that can run this: dense weights, KV cache, reserve, two one-expert buffers,
    the least batch.
    """
    batch = min(workload.prompt_tokens, assumed.MIN_PREFILL_BATCH)
    fixed = (
        assumed.GPU_RESERVE_BYTES + sizes.dense_bytes + sizes.kv_bytes(workload.context, workload.kv_dtype)
    )
    return fixed + 2 * sizes.gpu_expert_bytes + gpu_workspace_bytes(sizes.architecture, batch, 1)


def whole_layer_vram_bytes(sizes: ModelSizes, workload: Workload) -> int:
    """The smallest single GPU that takes a layer in one group and the prompt in one pass."""
    fixed = (
        assumed.GPU_RESERVE_BYTES + sizes.dense_bytes + sizes.kv_bytes(workload.context, workload.kv_dtype)
    )
    layer = sizes.architecture.num_experts * sizes.gpu_expert_bytes
    return fixed + 2 * layer + gpu_workspace_bytes(sizes.architecture, workload.prompt_tokens, 1)


def cpu_ram_bytes(sizes: ModelSizes, workload: Workload) -> int:
    """RAM that a machine without a GPU needs, without the system's reserve."""
    from krasis.runtime.planning.host import cpu_workspace_bytes

    batch = min(assumed.CPU_PREFILL_BATCH, workload.prompt_tokens)
    kept = sizes.dense_bytes + sizes.embedding_bytes + sizes.cpu_experts_bytes
    return (
        kept
        + sizes.kv_bytes(workload.context, workload.kv_dtype)
        + cpu_workspace_bytes(sizes.architecture, batch)
    )
