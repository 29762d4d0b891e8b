"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import groupby
from typing import Any

from krasis.formats.text_tables import text_fields, text_paragraphs, text_table
from krasis.formats.units import format_binary, format_bytes, format_count, format_rate, format_seconds
from krasis.runtime.planning.assumptions import DESCRIPTIONS
from krasis.runtime.planning.hardware import Figure, GpuSpec
from krasis.runtime.planning.host_kv import movable_layers
from krasis.runtime.planning.placement import rank_share
from krasis.runtime.planning.sizes import ModelSizes, count_parameters
from krasis.runtime.planning.types import Decode, GpuPlacement, HostPlacement, Plan, Prefill

_PATHS = {
    "streamed": "on the GPU, experts streamed from RAM",
    "resident": "on the GPU, experts in VRAM",
    "cpu": "attention on the GPU, experts on the CPU (sooner than streaming them)",
}
_STORES = {
    "in-place": "page cache pinned in place",
    "arena": "pinned arena",
    "ring": "mapped file and pinned ring",
    "none": "not in RAM",
}


def plan_to_json(plan: Plan, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Plain JSON types; figures are ``{value, source, note}``, sizes bytes, times seconds."""
    return {
        "notes": list(notes),
        "assumptions": {
            name: {"value": value, "source": "assumed", "note": text}
            for name, (value, text) in DESCRIPTIONS.items()
        },
        "sizes": sizes_to_json(plan.sizes),
        **{part.name: _plain(getattr(plan, part.name)) for part in fields(plan) if part.name != "sizes"},
    }


def sizes_to_json(sizes: ModelSizes) -> dict[str, Any]:
    """``model`` as a manifest has it; ``layers``: the kinds of layers, each with its number, what one weighs,
    and its experts. gpu_expert_bytes, cpu_expert_bytes: of the largest expert.
    """
    layers = [
        {
            "count": kind.count,
            "dense_bytes": kind.dense_bytes,
            "experts": None if kind.experts is None else asdict(kind.experts),
        }
        for kind in sizes.layers
    ]
    totals = ("dense_bytes", "embedding_bytes", "gpu_expert_bytes", "cpu_expert_bytes")
    others = ("gpu_layout", "cpu_layout", "source")
    return {
        "model": sizes.spec.to_json(),
        "layers": layers,
        **{name: getattr(sizes, name) for name in (*totals, *others)},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def plan_to_text(plan: Plan, notes: Sequence[str] = ()) -> str:
    """The human form, at most about 110 columns."""
    spec, work = plan.sizes.spec, plan.workload
    title = (
        f"Plan: {spec.family}, {format_count(count_parameters(spec).total)} parameters "
        f"(sizes from the {plan.sizes.source}), prompt of {work.prompt_tokens:,} tokens, "
        f"context {work.context:,}, KV {work.kv_dtype}"
    )
    parts = [title, "Hardware\n" + text_fields(_hardware_fields(plan))]
    if plan.gpus:
        parts.append("VRAM (decimal units)\n" + _indent(_gpu_table(plan.gpus)) + "\n" + _group_lines(plan))
    parts.append("RAM\n" + text_fields(_host_fields(plan.host, plan.sizes)))
    parts.append("Expected\n" + text_fields(_time_fields(plan)))
    parts.append("Assumed throughout\n" + text_fields(_assumption_fields()))
    if notes:
        parts.append("Notes\n" + text_paragraphs(notes))
    return "\n\n".join(parts)


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _figure(figure: Figure, unit: str) -> str:
    note = f": {figure.note}" if figure.note else ""
    return f"{figure.value:.4g} {unit} ({figure.source}{note})"


def _hardware_fields(plan: Plan) -> list[tuple[str, str]]:
    hardware = plan.hardware
    fields: list[tuple[str, str]] = []
    for spec, same in groupby(hardware.gpus):
        fields.extend(_gpu_fields(spec, len(list(same))))
    ram = hardware.ram_bytes
    size = f"{format_binary(int(ram.value))} ({ram.source}{': ' + ram.note if ram.note else ''})"
    return [
        *(fields or [("GPUs", "none")]),
        ("RAM", size),
        ("RAM reads", _figure(hardware.ram_gbps, "GB/s")),
        ("CPU cores", _figure(hardware.num_cores, "cores")),
        ("CPU int8", _figure(hardware.cpu_gmacs, "G multiply-adds/s")),
        ("disk", _figure(hardware.disk_gbps, "GB/s")),
    ]


def _gpu_fields(spec: GpuSpec, count: int) -> list[tuple[str, str]]:
    size = format_bytes(spec.vram_bytes)
    return [
        ("GPUs", f"{count} x {format_binary(spec.vram_bytes)} of VRAM ({size} each)"),
        ("  link", _figure(spec.link_gbps, "GB/s each")),
        ("  memory", _figure(spec.memory_gbps, "GB/s")),
        ("  bf16", _figure(spec.bf16_tflops, "TFLOP/s")),
    ]


def _alike(gpus: Sequence[GpuPlacement]) -> Iterator[tuple[str, GpuPlacement]]:
    """Neighbours that differ only in which experts they own, as (``0-1``, the first of them)."""
    for _, group in groupby(gpus, key=lambda gpu: replace(gpu, rank=0, first_expert=0)):
        same = list(group)
        yield (f"{same[0].rank}-{same[-1].rank}" if len(same) > 1 else str(same[0].rank)), same[0]


def _gpu_table(gpus: Sequence[GpuPlacement]) -> str:
    header = [
        "GPU",
        "experts",
        "dense",
        "KV",
        "workspace",
        "buffers",
        "resident",
        "reserve",
        "spare",
        "total",
    ]
    rows = []
    for names, key in _alike(gpus):
        parts = (
            key.dense_bytes,
            key.kv_bytes,
            key.workspace_bytes,
            key.buffer_bytes,
            key.resident_bytes,
            key.reserve_bytes,
            key.spare_bytes,
            key.vram_bytes,
        )
        rows.append([names, f"{key.num_experts}/layer", *[format_bytes(part) for part in parts]])
    return text_table(header, rows, "ll" + "r" * 8)


def _group_lines(plan: Plan) -> str:
    fields = []
    batch = f"{plan.batch_tokens:,} tokens"
    passes = plan.prefill.num_passes
    fields.append(("prefill batch", f"{batch}: {passes} pass{'es' if passes > 1 else ''} over the experts"))
    for names, gpu in _alike(plan.gpus):
        if gpu.num_groups == 0:
            text = f"all {gpu.resident_experts:,} experts live in VRAM, nothing is streamed"
        else:
            share = gpu.resident_experts / _own_experts(plan, gpu)
            text = (
                f"{gpu.num_groups} group{'s' if gpu.num_groups > 1 else ''} a layer of {gpu.group_experts} "
                f"experts, double-buffered; {gpu.resident_experts:,} hot experts resident ({share:.1%})"
            )
        fields.append((f"GPU {names}", text))
    if plan.gpus[0].host_kv_layers:
        fields.append(("KV in RAM", kv_in_ram_words(plan)))
    return text_fields(fields)


def kv_in_ram_words(plan: Plan) -> str:
    """How many layers' keys and values lie in RAM, and what that costs."""
    gpu, work = plan.gpus[0], plan.workload
    total = len(movable_layers(plan.sizes.spec))
    each_s = plan.decode.host_kv_s / work.prompt_tokens
    beside = " beside the CPU's experts" if plan.decode.cpu_experts_s else ""
    return (
        f"of {gpu.host_kv_layers} of {total} layers, {format_bytes(gpu.host_kv_bytes)}: a token of an answer "
        f"reads them in {format_seconds(each_s * 1000)} for each 1,000 before it{beside}, in "
        f"{format_seconds(each_s * work.context)} at the end of the context"
    )


def _own_experts(plan: Plan, gpu: GpuPlacement) -> int:
    """Of all layers."""
    num_ranks = len(plan.gpus)
    return sum(
        count * rank_share(experts.count, num_ranks, gpu.rank)[1]
        for count, experts in plan.sizes.expert_layers
    )


def _host_fields(host: HostPlacement, sizes: ModelSizes) -> list[tuple[str, str]]:
    parts = [
        ("CPU experts", host.cpu_experts_bytes, "mapped from the bundle (page cache)"),
        ("GPU experts", host.pinned_bytes, f"{_STORES[host.expert_store]}: {host.reason}"),
        ("page cache", host.page_cache_bytes, "GPU experts behind the ring"),
        ("from disk", host.from_disk_bytes, "GPU experts that RAM cannot hold, read in every pass"),
        ("dense", host.dense_bytes, "mapped"),
        ("n-gram table", sizes.table_bytes, f"on the disk: {format_bytes(sizes.looked_up_bytes)} a token"),
        ("KV cache", host.kv_bytes, "pinned" if host.pinned_bytes else ""),
        ("workspace", host.workspace_bytes, ""),
        ("reserve", host.reserve_bytes, "left to the system"),
    ]
    fields = [
        (name, f"{format_bytes(num_bytes):>9}  {text}")
        for name, num_bytes, text in parts
        if num_bytes or name == "GPU experts"
    ]
    return [*fields, ("spare", f"{format_bytes(host.spare_bytes):>9}  of {format_bytes(host.ram_bytes)}")]


def _assumption_fields() -> list[tuple[str, str]]:
    forms = {"bytes": format_bytes, "s": format_seconds}
    return [
        (forms.get(name.rsplit("_", 1)[-1], "{:g}".format)(value), text)
        for name, (value, text) in DESCRIPTIONS.items()
    ]


def _time_fields(plan: Plan) -> list[tuple[str, str]]:
    prefill, decode, start = plan.prefill, plan.decode, plan.start_up
    path = _PATHS[prefill.path] if plan.gpus else "on the CPU"
    warm = format_seconds(start.warm_s) if start.warm_s else "no time"
    return [
        (
            "prefill",
            f"{format_seconds(prefill.total_s)}, {format_rate(prefill.tokens_per_s)}, {path}",
        ),
        ("", _prefill_parts(prefill)),
        ("decode", f"{format_rate(decode.tokens_per_s)}, {format_seconds(decode.total_s)} a token"),
        ("", _decode_parts(decode)),
        (
            "start-up",
            f"{warm} from the page cache, {format_seconds(start.cold_s)} from a cold disk",
        ),
    ]


def _prefill_parts(prefill: Prefill) -> str:
    parts = [
        ("expert DMA", prefill.dma_s),
        ("expert matmuls", prefill.expert_s),
        ("dense", prefill.dense_s),
        ("attention", prefill.attention_s),
        ("exchange", prefill.exchange_s),
    ]
    return "; ".join(f"{name} {format_seconds(seconds)}" for name, seconds in parts if seconds)


def _decode_parts(decode: Decode) -> str:
    parts = [
        ("dense", decode.dense_s),
        ("KV", decode.kv_s),
        (f"KV in RAM ({format_bytes(decode.host_kv_bytes)})", decode.host_kv_s),
        (f"CPU experts ({format_bytes(decode.cpu_experts_bytes)})", decode.cpu_experts_s),
        ("GPU experts", decode.gpu_experts_s),
        ("expert DMA", decode.stream_s),
        ("beside reading", decode.handover_s),
    ]
    return "; ".join(f"{name} {format_seconds(seconds)}" for name, seconds in parts if seconds)
