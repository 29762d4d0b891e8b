"""Every blob of a bundle, and the bytes in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from krasis.formats.architecture import Architecture
from krasis.formats.bundle.writer import BlobSpec
from krasis.formats.layouts import Int8RowsLayout, padded_rows
from krasis.formats.layouts.expert_record import ExpertRecord
from scripts.models.random_bundle.pools import RMS_4, RMS_8, Pool, Pools, as_bytes
from scripts.models.random_bundle.request import BundleRequest

NORM_NOISE = 0.1


def blob_specs(arch: Architecture, request: BundleRequest) -> list[BlobSpec]:
    """Every blob that a converter would write (docs/FORMAT.md, section 5)."""
    int8_rows, hidden = Int8RowsLayout(), arch.hidden_size

    def plain(name: str, *shape: int, dtype: str = "BF16") -> BlobSpec:
        return BlobSpec(name, "dense", dtype, shape, "plain")

    def int8(name: str, n: int, k: int) -> list[BlobSpec]:
        codes = BlobSpec(name, "dense", "I8", int8_rows.codes_shape(n, k), int8_rows.layout_id)
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
    specs += int8("lm_head", padded_rows(arch.vocab_size), hidden)
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
    """The standard deviation of weights whose product with values of order one has values of order one."""
    return float(fan_in**-0.5)


def output_std(arch: Architecture, fan_in: int) -> float:
    """The standard deviation of weights whose product is added to the residual stream.

    2 * num_layers of such sums are of order one.

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
