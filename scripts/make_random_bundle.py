#!/usr/bin/env python3
"""Random-weight bundles of real layer shape, written as they lie on disk: at the speed of memory, no
checkpoint.

    python scripts/make_random_bundle.py --shape qwen3-235b-a22b --layers 16 --out /dev/shm/big.krasis

Codes are random without a bias (4 bits: -7..7, 8 bits: -127..127), scales such that activations stay of order
one through any number of layers, norms lie around one, and router rows are normal and of equal length, so
that tokens spread evenly over the experts. Drawing and packing hundreds of gigabytes would take hours: one
pool of each kind of section is drawn, and every expert's sections are runs of it from random places. Where
they begin comes from a hash of (seed, blob, expert): the same arguments give the same bytes, whatever the
number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from model_files import MoeShape, hub_config, to_bf16
from model_shapes import SHAPES, apply_overrides
from tqdm import tqdm

from krasis.formats.architecture import Architecture, from_hf_config
from krasis.formats.bundle_writer import PARTIAL_SUFFIX, BlobSpec, BundleWriter, plan_shards
from krasis.formats.errors import KrasisError, ResourceError
from krasis.formats.layouts import CpuTileLayout, Int8RowsLayout, MarlinLayout
from krasis.formats.layouts.expert_record import ExpertRecord
from krasis.formats.manifest import AssetRecord, Manifest, SourceRecord

Bytes = npt.NDArray[np.uint8]

POOL_BYTES = 64 << 20
NORM_NOISE = 0.1
SCALE_NOISE = 0.2
TINY_MODEL = Path(__file__).resolve().parent.parent / "tests" / "assets" / "tiny-qwen3-moe"
ASSETS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# Root mean squares of uniform codes -7..7 and -127..127.
RMS_4, RMS_8 = float(np.sqrt(280 / 15)), float(np.sqrt(127 * 128 / 3))
TILE_ROWS, TILE_COLUMNS = 32, 32


@dataclass(frozen=True, slots=True)
class BundleRequest:
    """What to write. tiers: of gpu, cpu. gpu_group: input features a scale. cpu_format: q8 or i4. tokenizer:
    the tiny model's, where the vocabulary has room for it.
    """

    shape: MoeShape
    seed: int = 0
    tiers: tuple[str, ...] = ("gpu", "cpu")
    gpu_group: int = 128
    cpu_format: str = "q8"
    num_threads: int = 0
    pool_bytes: int = POOL_BYTES

    @property
    def gpu_layout(self) -> MarlinLayout:
        return MarlinLayout(4, self.gpu_group, "BF16")

    @property
    def cpu_layout(self) -> CpuTileLayout:
        return CpuTileLayout(self.cpu_format)


class Pool:
    """Random bytes of one kind, of which runs are taken. unit_bytes: what runs are made of."""

    def __init__(self, data: Bytes, unit_bytes: int, seed: int, kind: str) -> None:
        self._data, self._unit, self._key = data.reshape(-1).data, unit_bytes, f"{seed}\0{kind}\0"
        self._num_units = data.nbytes // unit_bytes

    def run(self, name: str, num_bytes: int) -> Iterator[memoryview]:
        """num_bytes (a multiple of the unit) from places that depend on the name alone, in pieces."""
        count = num_bytes // self._unit
        for piece in range(1 << 62):
            if count <= 0:
                return
            digest = hashlib.blake2b(f"{self._key}{name}\0{piece}".encode(), digest_size=8).digest()
            begin = int.from_bytes(digest, "little") % self._num_units
            taken = min(count, self._num_units - begin)
            yield self._data[begin * self._unit : (begin + taken) * self._unit]
            count -= taken


class Pools:
    """Every kind of section that a bundle of one shape needs, drawn at the first use."""

    def __init__(self, request: BundleRequest) -> None:
        self._request = request
        self._made: dict[str, Pool] = {}

    def get(self, kind: str, unit_bytes: int, draw: Callable[[np.random.Generator, int], Bytes]) -> Pool:
        """The pool of a kind. draw(random, count): uint8 [count * unit_bytes]."""
        if kind not in self._made:
            key = hashlib.blake2b(f"{self._request.seed}\0{kind}".encode(), digest_size=16).digest()
            random = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
            count = max(1, self._request.pool_bytes // unit_bytes)
            self._made[kind] = Pool(draw(random, count), unit_bytes, self._request.seed, kind)
        return self._made[kind]

    def codes4(self) -> Pool:
        """Two 4-bit codes a byte, 1..15: -7..7 with the layout's offset of 8."""

        def draw(random: np.random.Generator, count: int) -> Bytes:
            low, high = (random.integers(1, 16, count, dtype=np.uint8) for _ in range(2))
            return low | high << 4

        return self.get("codes4", 1, draw)

    def codes8(self) -> Pool:
        """int8 codes -127..127."""
        return self.get(
            "codes8", 1, lambda random, count: random.integers(-127, 128, count, dtype=np.int8).view(np.uint8)
        )

    def scales(self, dtype: str, rms: float, std: float) -> Pool:
        """Scales that give codes of a root mean square weights of a standard deviation."""

        def draw(random: np.random.Generator, count: int) -> Bytes:
            return as_bytes(scale_values(random, count, rms, std), dtype)

        return self.get(f"scales-{dtype}-{rms}-{std}", 4 if dtype == "F32" else 2, draw)

    def tiles(self, layout: CpuTileLayout, std: float) -> Pool:
        """Whole tiles of CPU experts: 32 x 32 codes, then 32 F16 scales."""
        is_q8 = layout.tiles == "q8"
        code_bytes = TILE_ROWS * TILE_COLUMNS // (1 if is_q8 else 2)
        tile_bytes = code_bytes + 2 * TILE_ROWS

        def draw(random: np.random.Generator, count: int) -> Bytes:
            tiles = np.empty((count, tile_bytes), np.uint8)
            codes = self.codes8() if is_q8 else self.codes4()
            filled = b"".join(codes.run(f"tiles-{std}", count * code_bytes))
            tiles[:, :code_bytes] = np.frombuffer(filled, np.uint8).reshape(count, code_bytes)
            scales = scale_values(random, count * TILE_ROWS, RMS_8 if is_q8 else RMS_4, std)
            tiles[:, code_bytes:] = as_bytes(scales, "F16").reshape(count, -1)
            return tiles

        return self.get(f"tiles-{layout.tiles}-{std}", tile_bytes, draw)


def scale_values(random: np.random.Generator, count: int, rms: float, std: float) -> npt.NDArray[np.float32]:
    """f32 [count], log-normal around what gives weights of that standard deviation."""
    spread = np.exp(np.float32(SCALE_NOISE) * random.standard_normal(count, dtype=np.float32))
    return spread * np.float32(np.exp(-(SCALE_NOISE**2)) * std / rms)


def as_bytes(values: npt.NDArray[np.float32], dtype: str) -> Bytes:
    """Values in a bundle's dtype, as bytes."""
    if dtype == "BF16":
        return to_bf16(values).view(np.uint8)
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).view(np.uint8)


# ---- what lies where ---------------------------------------------------------------------------------------


def blob_specs(arch: Architecture, request: BundleRequest) -> list[BlobSpec]:
    """Every blob that a converter would write (docs/FORMAT.md, section 5)."""
    rows, hidden = Int8RowsLayout().layout_id, arch.hidden_size
    padded_vocab = -(-arch.vocab_size // 32) * 32

    def plain(name: str, *shape: int, dtype: str = "BF16") -> BlobSpec:
        return BlobSpec(name, "dense", dtype, shape, "plain")

    def int8(name: str, n: int, k: int) -> list[BlobSpec]:
        codes = BlobSpec(name, "dense", "I8", (n // 32, k // 4, 32, 4), rows)
        return [codes, plain(f"{name}.scale", n, dtype="F32")]

    specs = [plain("embedding", arch.vocab_size, hidden)]
    for i in range(arch.num_layers):
        at = f"layers.{i}."
        specs += int8(at + "attention.qkv", arch.qkv_rows, hidden)
        specs += int8(at + "attention.output", hidden, arch.attention_size)
        specs += [plain(at + f"attention.{part}_norm", arch.head_dim) for part in ("q", "k")]
        specs += [plain(at + "attention.norm", hidden), plain(at + "experts.norm", hidden)]
        specs.append(plain(at + "experts.router", arch.num_experts, hidden))
    specs.append(plain("final_norm", hidden))
    specs += int8("lm_head", padded_vocab, hidden)
    for tier in request.tiers:
        layout = request.gpu_layout if tier == "gpu" else request.cpu_layout
        record_bytes = layout.expert_record(hidden, arch.expert_intermediate_size).record_bytes
        for i in range(arch.num_layers):
            shape = (arch.num_experts, record_bytes)
            specs.append(BlobSpec(f"layers.{i}.experts.{tier}", tier, "U8", shape, layout.layout_id))
    return specs


def blob_pieces(
    spec: BlobSpec, arch: Architecture, request: BundleRequest, pools: Pools
) -> Iterator[memoryview | bytes]:
    """The bytes of a blob, in order."""
    part = spec.name.rpartition(".")[2]
    if spec.tier != "dense":
        yield from expert_pieces(spec, arch, request, pools)
    elif spec.dtype == "I8":
        yield from pools.codes8().run(spec.name, spec.num_bytes)
    elif part == "scale":
        is_output = spec.name.endswith("output.scale")
        std = output_std(arch, arch.attention_size) if is_output else input_std(arch.hidden_size)
        yield from pools.scales("F32", RMS_8, std).run(spec.name, spec.num_bytes)
    elif part in ("norm", "q_norm", "k_norm", "final_norm"):
        yield norm_values(spec, request.seed)
    elif part == "router":
        yield router_values(spec, request.seed)
    else:  # the embedding: values of order one
        yield from pools.get(
            "embedding",
            2,
            lambda random, count: as_bytes(random.standard_normal(count, dtype=np.float32), "BF16"),
        ).run(spec.name, spec.num_bytes)


def input_std(fan_in: int) -> float:
    """Of weights whose product with values of order one has values of order one."""
    return float(fan_in**-0.5)


def output_std(arch: Architecture, fan_in: int) -> float:
    """Of weights whose product is added to the residual stream: 2 * num_layers of such sums are of order one.

    So the embedding stays as loud as all layers together, tokens stay apart, and routers go on spreading
    them.
    """
    return float((2 * arch.num_layers * fan_in) ** -0.5)


def own_random(name: str, seed: int) -> np.random.Generator:
    """A generator of a blob's own."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def norm_values(spec: BlobSpec, seed: int) -> bytes:
    """Around one."""
    noise = own_random(spec.name, seed).standard_normal(spec.shape, dtype=np.float32)
    return as_bytes(1 + np.float32(NORM_NOISE) * noise, "BF16").tobytes()


def router_values(spec: BlobSpec, seed: int) -> bytes:
    """Rows of equal length: no expert is louder than another. Logits have a standard deviation of two."""
    rows = own_random(spec.name, seed).standard_normal(spec.shape, dtype=np.float32)
    rows *= 2 / np.linalg.norm(rows, axis=1, keepdims=True)
    return as_bytes(rows.reshape(-1), "BF16").tobytes()


def expert_pieces(
    spec: BlobSpec, arch: Architecture, request: BundleRequest, pools: Pools
) -> Iterator[memoryview | bytes]:
    """All experts of a layer, sections from the pools and zeros in between."""
    hidden, inner = arch.hidden_size, arch.expert_intermediate_size
    w13_std, w2_std = input_std(hidden), output_std(arch, inner)
    if spec.tier == "gpu":
        layout = request.gpu_layout
        record = layout.expert_record(hidden, inner)
        scales = [pools.scales("BF16", RMS_4, std) for std in (w13_std, w2_std)]
        sources = (pools.codes4(), scales[0], pools.codes4(), scales[1])
    else:
        tiles = request.cpu_layout
        record = tiles.expert_record(hidden, inner)
        sources = (pools.tiles(tiles, w13_std), None, pools.tiles(tiles, w2_std), None)
    for expert in range(spec.shape[0]):
        yield from record_pieces(record, sources, f"{spec.name}\0{expert}")


def record_pieces(
    record: ExpertRecord, sources: tuple[Pool | None, ...], name: str
) -> Iterator[memoryview | bytes]:
    """One expert's record."""
    end = 0
    for number, (section, pool) in enumerate(zip(record.sections, sources, strict=True)):
        if pool is None or not section.num_bytes:
            continue
        if section.offset_bytes > end:
            yield bytes(section.offset_bytes - end)
        yield from pool.run(f"{name}\0{number}", section.num_bytes)
        end = section.end_bytes
    if record.record_bytes > end:
        yield bytes(record.record_bytes - end)


# ---- writing -----------------------------------------------------------------------------------------------


def assets_for(shape: MoeShape) -> dict[str, bytes]:
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
    return plan_shards(blob_specs(architecture_of(request.shape), request)).total_bytes


def architecture_of(shape: MoeShape) -> Architecture:
    """Our record of a shape."""
    return from_hf_config(hub_config(shape), "random bundle")


def make_bundle(request: BundleRequest, out: Path, report: Callable[[int], object] = lambda _: None) -> int:
    """Writes the bundle; report is told of bytes as they are written. Gives all bytes.

    Raises UsageError if out exists, ResourceError if there is too little room, before anything is written.
    """
    arch = architecture_of(request.shape)
    plan = plan_shards(blob_specs(arch, request))
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
                for piece in blob_pieces(spec, arch, request, pools):
                    sink.write(piece)
                    report(len(piece))
                digests[spec.name] = sink.close()

        specs = [blob.spec for file in plan.files for blob in file.blobs]
        for spec in specs[:1]:
            write(spec)
        draw_pools(arch, request, pools)
        threads = request.num_threads or min(16, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads) as executor:
            for _ in executor.map(write, specs[1:]):
                pass
        assets = [writer.write_asset(name, data) for name, data in sorted(assets_for(request.shape).items())]
        writer.finish(manifest_of(arch, request, plan, digests, assets), out)
    return plan.total_bytes


def draw_pools(arch: Architecture, request: BundleRequest, pools: Pools) -> None:
    """Before the threads begin: a pool is drawn once, and by one of them."""
    seen: set[str] = set()
    for spec in blob_specs(arch, request):
        kind = f"{spec.tier}-{spec.dtype}-{spec.name.rpartition('.')[2]}"
        if kind not in seen or spec.name.endswith("output.scale"):
            seen.add(kind)
            next(iter(blob_pieces(spec, arch, request, pools)))


def manifest_of(
    arch: Architecture,
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
        architecture=arch,
        layouts=layouts,
        files=plan.file_records(),
        blobs=plan.blob_records(digests),
        assets=tuple(assets),
        sources=(SourceRecord("random numbers", "none", 0, f"seed {request.seed}"),),
        recipe={"random": True, "seed": request.seed, "pool_bytes": request.pool_bytes},
    )


SIZE = click.IntRange(min=1)


@click.command()
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="tiny", show_default=True)
@click.option("--layers", type=SIZE, help="num_hidden_layers")
@click.option("--experts", type=SIZE, help="num_experts")
@click.option("--vocab", type=SIZE, help="vocab_size")
@click.option("--tiers", default="gpu,cpu", show_default=True, help="gpu, cpu or both.")
@click.option("--gpu-group", type=click.Choice(["32", "64", "128"]), default="128", show_default=True)
@click.option("--cpu-format", type=click.Choice(["q8", "i4"]), default="q8", show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="0: one a CPU, at most 16.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    out: Path, seed: int, tiers: str, gpu_group: str, cpu_format: str, threads: int, **given: Any
) -> None:
    """Write a .krasis bundle with random weights. Options override the named shape's sizes."""
    overrides = {
        "num_hidden_layers": given["layers"],
        "num_experts": given["experts"],
        "vocab_size": given["vocab"],
    }
    chosen = tuple(part.strip() for part in tiers.split(","))
    if not set(chosen) <= {"gpu", "cpu"}:
        raise click.UsageError(f"--tiers {tiers}: gpu, cpu or both")
    try:
        shape = apply_overrides(SHAPES[given["shape"]], overrides, None)
        request = BundleRequest(shape, seed, chosen, int(gpu_group), cpu_format, threads)
        with tqdm(total=bundle_bytes(request), unit="B", unit_scale=True, desc=out.name) as bar:
            written = make_bundle(request, out, bar.update)
    except (ValueError, KrasisError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {written / 1e9:.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
