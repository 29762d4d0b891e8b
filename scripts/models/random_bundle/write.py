"""Writes the bundle: shards by several threads, text files, the manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from krasis.formats.bundle.manifest import AssetRecord, Manifest, SourceRecord
from krasis.formats.bundle.writer import PARTIAL_SUFFIX, BlobSpec, BundleWriter, plan_shards
from krasis.formats.errors import ResourceError
from krasis.formats.layouts import Int8RowsLayout
from krasis.formats.models.spec import ModelSpec
from scripts.models.model_files import Shape, hub_config
from scripts.models.random_bundle.blobs import blob_pieces, blob_specs
from scripts.models.random_bundle.pools import Pools
from scripts.models.random_bundle.request import BundleRequest, spec_of_shape

TINY_MODEL = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
ASSETS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def assets_for(shape: Shape) -> dict[str, bytes]:
    """config.json, and the tiny model's tokenizer if the vocabulary has room for it."""
    found: dict[str, bytes] = {}
    special: dict[str, int] = {}
    if (TINY_MODEL / "tokenizer.json").is_file():
        data = json.loads((TINY_MODEL / "tokenizer.json").read_text("utf-8"))
        ids = dict(data["model"]["vocab"]) | {one["content"]: one["id"] for one in data["added_tokens"]}
        if max(ids.values()) < shape.vocab_size:
            found = {name: (TINY_MODEL / name).read_bytes() for name in ASSETS}
            settings = json.loads(found["tokenizer_config.json"])
            special = {"eos": ids[settings["eos_token"]], "pad": ids[settings["pad_token"]]}
    return {"config.json": json.dumps(hub_config(shape, **special), indent=2).encode() + b"\n", **found}


def bundle_bytes(request: BundleRequest) -> int:
    """What the bundle's shards will take. Raises KrasisError for an impossible shape."""
    return plan_shards(blob_specs(spec_of_shape(request.shape), request)).total_bytes


def make_bundle(request: BundleRequest, out: Path, report: Callable[[int], object] = lambda _: None) -> int:
    """Writes the bundle; report is told of bytes as they are written. Gives all bytes.

    Raises UsageError if out exists, ResourceError if there is too little room, before anything is written.
    """
    model = spec_of_shape(request.shape)
    plan = plan_shards(blob_specs(model, request))
    folder = out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if plan.total_bytes > free:
        raise ResourceError(
            "too little room for the bundle",
            where=str(folder),
            got=plan.total_bytes,
            limit=f"{free} bytes free",
        )
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    if partial.is_dir():
        shutil.rmtree(partial)  # of an earlier run: this takes a minute, and is not resumed
    pools = Pools(request)
    digests: dict[str, str] = {}

    # Through the page cache: the bundle is meant to be read at once, and tmpfs has no other way.
    with BundleWriter(partial, plan, output_io="buffered") as writer:
        writer.create()

        def write(spec: BlobSpec) -> None:
            with writer.open_blob(spec.name) as sink:
                for piece in blob_pieces(spec, model, request, pools):
                    sink.write(piece)
                    report(len(piece))
                digests[spec.name] = sink.close()

        specs = [blob.spec for file in plan.files for blob in file.blobs]
        for spec in specs[:1]:
            write(spec)
        draw_pools(model, request, pools)
        threads = request.num_threads or min(16, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads) as executor:
            for _ in executor.map(write, specs[1:]):
                pass
        assets = [writer.write_asset(name, data) for name, data in sorted(assets_for(request.shape).items())]
        writer.finish(manifest_of(model, request, plan, digests, assets), out)
    return plan.total_bytes


def draw_pools(model: ModelSpec, request: BundleRequest, pools: Pools) -> None:
    """Before the threads begin: a pool is drawn once, and by one of them."""
    seen: set[str] = set()
    for spec in blob_specs(model, request):
        kind = f"{spec.tier}-{spec.dtype}-{spec.name.rpartition('.')[2]}"
        if kind not in seen or spec.name.endswith(("output.scale", "w2.scale")):
            seen.add(kind)
            next(iter(blob_pieces(spec, model, request, pools)))


def manifest_of(
    model: ModelSpec,
    request: BundleRequest,
    plan: Any,
    digests: Mapping[str, str],
    assets: list[AssetRecord],
) -> Manifest:
    """Says that it is random, and of which seed."""
    layouts = {"dense": Int8RowsLayout().layout_id}
    if "gpu" in request.tiers:
        layouts["gpu"] = request.gpu_layout.layout_id
    if "cpu" in request.tiers:
        layouts["cpu"] = request.cpu_layout.layout_id
    return Manifest(
        tool_version="make_random_bundle 1",
        spec=model,
        layouts=layouts,
        files=plan.file_records(),
        blobs=plan.blob_records(digests),
        assets=tuple(assets),
        sources=(SourceRecord("random numbers", "none", 0, f"seed {request.seed}"),),
        recipe={"random": True, "seed": request.seed, "pool_bytes": request.pool_bytes},
    )
