"""``krasis-info --plan``: of a bundle, of a shape's name, or of a model that is no bundle yet."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from krasis.formats.checkpoints.quantised.kept import NO_CODES, KeptCodes
from krasis.formats.models.spec import ModelSpec
from krasis.formats.text_tables import text_fields
from krasis.formats.units import format_bytes, format_rate, parse_bytes, parse_gpus
from krasis.runtime.cli.info_source import PlannedModel
from krasis.runtime.missing_kernels import GPU_RUNS, lacking
from krasis.runtime.planning.formats import ChosenFormats, choose_formats
from krasis.runtime.planning.hardware import HardwareSpec
from krasis.runtime.planning.named_parts import memory_gbps, named_gpus
from krasis.runtime.planning.planner import make_plan, make_workload
from krasis.runtime.planning.probes import HardwareFlags, hardware_from_flags
from krasis.runtime.planning.ranges import HIGHER, LOWER, Ranges, ranges_of
from krasis.runtime.planning.report import plan_to_json, plan_to_text
from krasis.runtime.planning.sizes import ModelSizes
from krasis.runtime.planning.types import Workload
from krasis.runtime.this_machine import ThisMachine


class PlanRequest(Protocol):
    """What of the command line a plan is made from. Sizes and GPU lists are still text."""

    @property
    def gpus(self) -> str | None: ...
    @property
    def gpu(self) -> str | None: ...
    @property
    def memory(self) -> str | None: ...
    @property
    def ram(self) -> str | None: ...
    @property
    def pcie_gbps(self) -> float | None: ...
    @property
    def gpu_gbps(self) -> float | None: ...
    @property
    def gpu_tflops(self) -> float | None: ...
    @property
    def ram_gbps(self) -> float | None: ...
    @property
    def cpus(self) -> int | None: ...
    @property
    def cpu_gmacs(self) -> float | None: ...
    @property
    def disk_gbps(self) -> float | None: ...
    @property
    def context(self) -> int | None: ...
    @property
    def prompt_tokens(self) -> int | None: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def cpu_format(self) -> str | None: ...
    @property
    def gpu_group(self) -> str | None: ...


def add_plan(
    request: PlanRequest,
    model: ModelSizes | PlannedModel,
    record: dict[str, Any],
    texts: list[str],
    shard: Path | None = None,
) -> None:
    """Adds the plan to what is printed. Raises KrasisError."""
    spec = model.spec
    workload = _workload(request, spec)
    hardware, notes = hardware_from_flags(_flags(request), ThisMachine(shard))
    if hardware.gpus and (missing := lacking(spec, GPU_RUNS)):
        notes = (*notes, f"the GPU has no kernels yet for {missing[0]}: the plan is what they would give")
    if isinstance(model, PlannedModel):
        chosen = _chosen(request, spec, hardware, workload, model.kept)
        sizes = chosen.sizes
        if model.refused is not None:
            notes = (*notes, f"krasis-convert refuses this checkpoint: {model.refused}")
        record["conversion"] = _conversion(model, chosen)
        texts.append(_conversion_text(model, chosen))
    elif model.source == "shape":
        chosen = _chosen(request, spec, hardware, workload)
        sizes = model
        if chosen.sizes.cpu_layout != model.cpu_layout:
            sizes = chosen.sizes
            notes = (*notes, f"CPU experts in {chosen.cpu_format}: {chosen.reason}")
    else:
        sizes = model
    plan = make_plan(sizes, hardware, workload)
    ranges = ranges_of(plan)
    record["plan"] = {**plan_to_json(plan, notes), "ranges": None if ranges is None else asdict(ranges)}
    texts.append(plan_to_text(plan, notes))
    if ranges is not None:
        texts.append(_ranges_text(ranges))


def _workload(request: PlanRequest, spec: ModelSpec) -> Workload:
    return make_workload(
        spec, context=request.context, prompt_tokens=request.prompt_tokens, kv_dtype=request.kv_dtype
    )


def _flags(request: PlanRequest) -> HardwareFlags:
    return HardwareFlags(
        gpu_vram_bytes=parse_gpus(request.gpus) if request.gpus is not None else None,
        gpus=named_gpus(request.gpu) if request.gpu is not None else None,
        pcie_gbps=request.pcie_gbps,
        gpu_gbps=request.gpu_gbps,
        gpu_tflops=request.gpu_tflops,
        ram_bytes=parse_bytes(request.ram, "--ram") if request.ram is not None else None,
        ram_gbps=request.ram_gbps,
        memory=memory_gbps(request.memory) if request.memory is not None else None,
        num_cpus=request.cpus,
        cpu_gmacs=request.cpu_gmacs,
        disk_gbps=request.disk_gbps,
    )


def _chosen(
    request: PlanRequest,
    spec: ModelSpec,
    hardware: HardwareSpec,
    workload: Workload,
    kept: KeptCodes = NO_CODES,
) -> ChosenFormats:
    formats = {"cpu_format": request.cpu_format, "gpu_group": request.gpu_group}
    return choose_formats(spec, hardware, workload, kept=kept, **formats)


def _conversion(model: PlannedModel, chosen: ChosenFormats) -> dict[str, Any]:
    sizes = chosen.sizes
    return {
        "model": model.name,
        "commit": model.commit,
        "download_bytes": model.download_bytes,
        "bundle_bytes": chosen.bundle_bytes,
        "gpu_experts_bytes": sizes.gpu_experts_bytes,
        "cpu_experts_bytes": sizes.cpu_experts_bytes,
        "dense_bytes": sizes.dense_bytes + sizes.embedding_bytes,
        "gpu_layout": sizes.gpu_layout,
        "cpu_layout": sizes.cpu_layout,
        "cpu_format": chosen.cpu_format,
        "cpu_format_reason": chosen.reason,
    }


def _conversion_text(model: PlannedModel, chosen: ChosenFormats) -> str:
    sizes = chosen.sizes
    dense = sizes.dense_bytes + sizes.embedding_bytes
    parts = (
        f"dense {format_bytes(dense)}, GPU experts {format_bytes(sizes.gpu_experts_bytes)}, CPU experts "
        f"{format_bytes(sizes.cpu_experts_bytes)}"
    )
    if sizes.table_bytes:
        parts += f", n-gram table {format_bytes(sizes.table_bytes)}"
    fields = [("bundle", f"{format_bytes(chosen.bundle_bytes)} on disk: {parts}")]
    fields.append(("CPU experts", f"{chosen.cpu_format}: {chosen.reason}"))
    if model.download_bytes is not None:
        kept = f"{format_bytes(model.download_bytes)} (krasis-convert --drop-sources keeps none of it)"
        fields.insert(0, ("download", kept))
    option = (
        "" if chosen.cpu_format == "q8" or model.kept != NO_CODES else f" --cpu-format {chosen.cpu_format}"
    )
    fields.append(("command", f"krasis-convert {model.name}{option} -o model.krasis"))
    return f"Conversion of {model.name}\n" + text_fields(fields)


def _ranges_text(ranges: Ranges) -> str:
    prefill, decode = ranges.prefill_tokens_per_s, ranges.decode_tokens_per_s
    fields = [
        ("prefill", f"{format_rate(prefill[0])} to {format_rate(prefill[1])}"),
        ("decode", f"{format_rate(decode[0])} to {format_rate(decode[1])}"),
    ]
    share = f"{1 - LOWER:.0%} lower to {HIGHER - 1:.0%} higher"
    return f"If assumed rates are {share}\n" + text_fields(fields)
