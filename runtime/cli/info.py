"""What is inside a bundle, as JSON and as text. Reads the manifest and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from krasis.formats.bundle.manifest import BlobRecord, Manifest
from krasis.formats.bundle.verify import Problem
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.printable import printable
from krasis.formats.text_tables import text_fields, text_table
from krasis.formats.units import format_bytes
from krasis.runtime.cli.info_model import model_fields, model_to_json
from krasis.runtime.planning.planner import (
    cpu_ram_bytes,
    least_vram_bytes,
    make_workload,
    whole_layer_vram_bytes,
)
from krasis.runtime.planning.sizes import ModelSizes, count_parameters, sizes_of_bundle
from krasis.runtime.planning.types import Workload

TIER_NAMES = {"dense": "dense weights", "gpu": "GPU experts", "cpu": "CPU experts", "table": "n-gram table"}


def bundle_to_json(manifest: Manifest, path: str, workload: Workload | None = None) -> dict[str, Any]:
    """The summary in plain JSON types: sizes in bytes, relative MSE as fractions."""
    sizes = sizes_of_bundle(manifest)
    parameters = count_parameters(sizes.spec)
    workload = workload or make_workload(sizes.spec)
    return {
        "path": path,
        "format": [manifest.format_major, manifest.format_minor],
        "tool_version": manifest.tool_version,
        "architecture": _flat_architecture(manifest),
        "model": model_to_json(manifest.spec),
        "max_context": manifest.spec.max_context,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "experts": parameters.experts,
        },
        "tiers": tiers_to_json(manifest),
        "total_bytes": sum(record.num_bytes for record in manifest.files)
        + sum(asset.num_bytes for asset in manifest.assets),
        "assets": [
            {"name": asset.name, "num_bytes": asset.num_bytes, "decompressed_bytes": asset.decompressed_bytes}
            for asset in manifest.assets
        ],
        "sources": [
            {"name": source.name, "kind": source.kind, "num_bytes": source.num_bytes, "digest": source.digest}
            for source in manifest.sources
        ],
        "recipe": dict(manifest.recipe),
        "quality": dict(manifest.quality),
        "needs": needs_to_json(sizes, workload),
    }


def _flat_architecture(manifest: Manifest) -> dict[str, Any] | None:
    """The flat record of format 1.0, which programs may read; None for a model that it cannot describe."""
    try:
        return manifest.architecture.to_json()
    except UnsupportedModelError:
        return None


def tiers_to_json(manifest: Manifest) -> dict[str, Any]:
    """For each tier: layout, bytes of its blobs, number of blobs, files with their bytes."""
    file_bytes = {record.name: record.num_bytes for record in manifest.files}
    tiers: dict[str, Any] = {}
    for tier in sorted({blob.tier for blob in manifest.blobs}, key=_tier_order):
        blobs = [blob for blob in manifest.blobs if blob.tier == tier]
        names = sorted({blob.file for blob in blobs})
        tiers[tier] = {
            "layout": manifest.layouts.get(tier, ""),
            "num_bytes": sum(blob.num_bytes for blob in blobs),
            "num_blobs": len(blobs),
            "files": [{"name": name, "num_bytes": file_bytes[name]} for name in names],
        }
    return tiers


def _tier_order(tier: str) -> tuple[int, str]:
    known = list(TIER_NAMES)
    return (known.index(tier) if tier in known else len(known), tier)


def needs_to_json(sizes: ModelSizes, workload: Workload) -> dict[str, Any]:
    """Memory needed for a context of ``workload.context`` positions; VRAM figures are None without GPU
    experts.
    """
    has_gpu, has_cpu = sizes.gpu_expert_bytes > 0, sizes.cpu_expert_bytes > 0
    return {
        "context": workload.context,
        "kv_bytes": sizes.kv_bytes(workload.context, workload.kv_dtype),
        "cpu_only_ram_bytes": cpu_ram_bytes(sizes, workload) if has_cpu else None,
        "cpu_experts_bytes": sizes.cpu_experts_bytes,
        "gpu_experts_bytes": sizes.gpu_experts_bytes,
        "least_vram_bytes": least_vram_bytes(sizes, workload) if has_gpu else None,
        "one_group_vram_bytes": whole_layer_vram_bytes(sizes, workload) if has_gpu else None,
        "decoded_token_reads_bytes": {
            "dense": sizes.dense_bytes,
            "cpu_experts": sizes.routed_cpu_bytes,
            "table": sizes.looked_up_bytes,
        },
    }


def bundle_to_text(summary: Mapping[str, Any]) -> str:
    """The human form of ``bundle_to_json``'s record, about 100 columns at most."""
    parts = [
        f"{summary['path']}: Krasis bundle, {format_bytes(summary['total_bytes'])}",
        text_fields(_model_fields(summary)),
        "Tiers\n" + _tier_table(summary["tiers"]),
        "Needs\n" + text_fields(_need_fields(summary["needs"])),
        "Recipe\n" + (text_fields(_flat(summary["recipe"])) or "  (not recorded)"),
        "Sources\n" + _source_table(summary["sources"]),
        "Quality (squared error over squared sum, against the source)\n" + _quality_text(summary["quality"]),
        "Assets\n" + _asset_text(summary["assets"]),
    ]
    return "\n\n".join(parts)


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _model_fields(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        *model_fields(summary),
        (
            "format",
            f"{summary['format'][0]}.{summary['format'][1]}, written by krasis {summary['tool_version']}",
        ),
    ]


def _tier_table(tiers: Mapping[str, Any]) -> str:
    rows = []
    for tier, record in tiers.items():
        files = record["files"]
        names = files[0]["name"] if len(files) == 1 else f"{files[0]['name']} and {len(files) - 1} more"
        rows.append(
            [
                TIER_NAMES.get(tier, tier),
                format_bytes(record["num_bytes"]),
                record["layout"] or "-",
                f"{record['num_blobs']:,}",
                names,
            ]
        )
    return _indent(text_table(["tier", "bytes", "layout", "blobs", "files"], rows, "lrlrl"))


def _need_fields(needs: Mapping[str, Any]) -> list[tuple[str, str]]:
    reads = needs["decoded_token_reads_bytes"]
    fields = [("KV cache", f"{format_bytes(needs['kv_bytes'])} for a context of {needs['context']:,}")]
    if needs["cpu_only_ram_bytes"] is not None:
        fields.append(("without GPU", f"{format_bytes(needs['cpu_only_ram_bytes'])} of RAM"))
    if needs["least_vram_bytes"] is not None:
        both = needs["cpu_experts_bytes"] + needs["gpu_experts_bytes"]
        fields.append(
            (
                "with a GPU",
                f"{format_bytes(needs['least_vram_bytes'])} of VRAM at least, "
                f"{format_bytes(needs['one_group_vram_bytes'])} for whole layers; "
                f"{format_bytes(both)} of RAM for experts",
            )
        )
    per_token = (
        f"{format_bytes(reads['dense'])} dense and {format_bytes(reads['cpu_experts'])} of CPU experts"
    )
    if reads["table"]:
        per_token += f", {format_bytes(reads['table'])} of the n-gram table (from the disk)"
    return [*fields, ("a token reads", per_token)]


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as dotted names."""
    fields: list[tuple[str, str]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            fields.extend(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, list):
            fields.append((f"{prefix}{name}", ", ".join(_scalar(item) for item in value) or "-"))
        else:
            fields.append((f"{prefix}{name}", _scalar(value)))
    return fields


def _scalar(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _source_table(sources: Sequence[Mapping[str, Any]]) -> str:
    if not sources:
        return "  (not recorded)"
    rows = [
        [source["name"], source["kind"], format_bytes(source["num_bytes"]), source["digest"]]
        for source in sources
    ]
    return _indent(text_table(["file", "kind", "bytes", "digest"], rows, "llrl"))


def _quality_text(quality: Mapping[str, Any]) -> str:
    """A line for each tensor kind with its relative MSE in percent; anything else that was recorded below."""
    measured = {name: record for name, record in quality.items() if _is_measured(record)}
    others = {name: record for name, record in quality.items() if name not in measured}
    rows = [
        [
            name,
            f"{100 * record['relative_mse']:.4f} %" if record["relative_mse"] else "none (lossless)",
            _scalar(record.get("max_abs_error")),
            f"{record['count']:,}" if isinstance(record.get("count"), int) else "-",
        ]
        for name, record in measured.items()
    ]
    header = ["tensor kind", "relative MSE", "largest error", "weights"]
    parts = [_indent(text_table(header, rows, "lrrr"))] if rows else []
    if others:
        parts.append(text_fields(_flat(others)))
    return "\n".join(parts) or "  (not recorded)"


def _is_measured(record: object) -> bool:
    if not isinstance(record, Mapping):
        return False
    error = record.get("relative_mse")
    return isinstance(error, int | float) and not isinstance(error, bool)


def _asset_text(assets: Sequence[Mapping[str, Any]]) -> str:
    if not assets:
        return "  (none: this bundle has no tokenizer)"
    rows = [
        [asset["name"], format_bytes(asset["num_bytes"]), format_bytes(asset["decompressed_bytes"])]
        for asset in assets
    ]
    return _indent(text_table(["asset", "stored", "text"], rows, "lrr"))


def tensors_to_json(manifest: Manifest) -> list[dict[str, Any]]:
    """Every blob in the order of its place: name, tier, dtype, shape, layout, file, offset, bytes,
    checksum.
    """
    return [
        {
            "name": blob.name,
            "tier": blob.tier,
            "dtype": blob.dtype,
            "shape": list(blob.shape),
            "layout": blob.layout,
            "file": blob.file,
            "offset_bytes": blob.offset_bytes,
            "num_bytes": blob.num_bytes,
            "xxh3_128": blob.xxh3_128,
        }
        for blob in sorted(manifest.blobs, key=_place)
    ]


def _place(blob: BlobRecord) -> tuple[tuple[int, str], str, int]:
    return (_tier_order(blob.tier), blob.file, blob.offset_bytes)


def tensors_to_text(tensors: Sequence[Mapping[str, Any]]) -> str:
    """One line a blob."""
    rows = [
        [
            tensor["name"],
            tensor["tier"],
            tensor["dtype"],
            "x".join(str(size) for size in tensor["shape"]),
            tensor["layout"],
            tensor["file"].removesuffix(".safetensors"),
            f"{tensor['offset_bytes']}",
            f"{tensor['num_bytes']}",
        ]
        for tensor in tensors
    ]
    header = ["name", "tier", "dtype", "shape", "layout", "file", "offset", "bytes"]
    return text_table(header, rows, "llllllrr")


def problem_to_text(problem: Problem) -> str:
    """One line."""
    return printable(" ".join(str(problem).split()))
