"""Every blob of a bundle, and the bytes in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from krasis.formats.bundle.blob_names import expert_blob
from krasis.formats.bundle.writer import BlobSpec
from krasis.formats.layouts import Int8RowsLayout
from krasis.formats.layouts.expert_record import ExpertRecord
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import blobs, dense_tensors_of
from scripts.models.random_bundle.pools import RMS_4, RMS_8, Pool, Pools, as_bytes
from scripts.models.random_bundle.request import BundleRequest

NORM_NOISE = 0.1


def blob_specs(spec: ModelSpec, request: BundleRequest) -> list[BlobSpec]:
    """Every blob that a converter would write (docs/FORMAT.md, section 5)."""
    layout_ids = {"plain": "plain", "int8_rows": Int8RowsLayout().layout_id}
    specs = [
        BlobSpec(blob.name, "dense", blob.dtype or "BF16", blob.shape, layout_ids[blob.layout])
        for blob in blobs(spec)
    ]
    for tier in request.tiers:
        layout = request.gpu_layout if tier == "gpu" else request.cpu_layout
        for i in spec.expert_layers:
            experts = spec.experts_of(i)
            sizes = experts.width(spec.hidden), experts.intermediate, experts.gated
            record_bytes = layout.expert_record(*sizes).record_bytes
            shape = (experts.count, record_bytes)
            specs.append(BlobSpec(expert_blob(i, tier), tier, "U8", shape, layout.layout_id))
    return specs


def blob_pieces(
    blob: BlobSpec, spec: ModelSpec, request: BundleRequest, pools: Pools
) -> Iterator[memoryview | bytes]:
    """The bytes of a blob, in order."""
    part = blob.name.rpartition(".")[2]
    if blob.tier != "dense":
        yield from expert_pieces(blob, spec, request, pools)
    elif blob.dtype == "I8":
        yield from pools.codes8().run(blob.name, blob.num_bytes)
    elif part == "scale":
        yield from pools.scales("F32", RMS_8, _std(blob.name, spec)).run(blob.name, blob.num_bytes)
    elif part in ("norm", "q_norm", "k_norm", "final_norm", "gate_norm"):
        yield norm_values(blob, request.seed)
    elif part in ("bias", "correction_bias", "dt_bias", "sinks", "d"):
        yield bias_values(blob, request.seed)
    elif part in ("conv", "a_log"):
        yield delta_values(blob, request.seed)
    elif part in ("router", "gate", "ba", "dt"):
        yield router_values(blob, request.seed)
    else:  # the embedding: values of order one
        yield from pools.get(
            "embedding",
            2,
            lambda random, count: as_bytes(random.standard_normal(count, dtype=np.float32), "BF16"),
        ).run(blob.name, blob.num_bytes)


def _std(name: str, spec: ModelSpec) -> float:
    """Of the weights that a blob of scales belongs to: those whose product goes to the residual are small."""
    tensor = name.removesuffix(".scale")
    if not tensor.endswith((".output", ".w2")):
        return input_std(spec.hidden)
    layer = int(tensor.split(".")[1])
    (columns,) = (one.shape[1] for one in dense_tensors_of(spec, layer) if tensor.endswith(f".{one.name}"))
    return output_std(len(spec.layers), columns)


def input_std(fan_in: int) -> float:
    """The standard deviation of weights whose product with values of order one has values of order one."""
    return float(fan_in**-0.5)


def output_std(num_layers: int, fan_in: int) -> float:
    """The standard deviation of weights whose product is added to the residual stream.

    2 * num_layers of such sums are of order one.

    So the embedding stays as loud as all layers together, tokens stay apart, and routers go on spreading
    them.
    """
    return float((2 * num_layers * fan_in) ** -0.5)


def own_random(name: str, seed: int) -> np.random.Generator:
    """A generator of a blob's own."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def norm_values(spec: BlobSpec, seed: int) -> bytes:
    """Around one."""
    noise = own_random(spec.name, seed).standard_normal(spec.shape, dtype=np.float32)
    return as_bytes(1 + np.float32(NORM_NOISE) * noise, "BF16").tobytes()


def bias_values(spec: BlobSpec, seed: int) -> bytes:
    """Around zero, small beside what they are added to."""
    noise = own_random(spec.name, seed).standard_normal(spec.shape, dtype=np.float32)
    return as_bytes(np.float32(NORM_NOISE) * noise, "F32").tobytes()


def delta_values(spec: BlobSpec, seed: int) -> bytes:
    """Of a convolution, whose sums are of order one; logarithms of decay rates, of which most of the state
    stays."""
    noise = own_random(spec.name, seed).standard_normal(spec.shape, dtype=np.float32)
    values = noise - 2 if len(spec.shape) == 1 else noise * np.float32(spec.shape[-1] ** -0.5)
    return as_bytes(values.reshape(-1), "F32").tobytes()


def router_values(spec: BlobSpec, seed: int) -> bytes:
    """Rows of equal length: no expert is louder than another. Logits have a standard deviation of two."""
    rows = own_random(spec.name, seed).standard_normal(spec.shape, dtype=np.float32)
    rows *= 2 / np.linalg.norm(rows, axis=1, keepdims=True)
    return as_bytes(rows.reshape(-1), "BF16").tobytes()


def expert_pieces(
    blob: BlobSpec, spec: ModelSpec, request: BundleRequest, pools: Pools
) -> Iterator[memoryview | bytes]:
    """All experts of a layer, sections from the pools and zeros in between."""
    experts = spec.experts_of(int(blob.name.split(".")[1]))
    hidden, inner = experts.width(spec.hidden), experts.intermediate
    w13_std, w2_std = input_std(hidden), output_std(len(spec.layers), inner)
    if blob.tier == "gpu":
        layout = request.gpu_layout
        record = layout.expert_record(hidden, inner, experts.gated)
        is_fp4 = layout.scale_dtype == "E8M0"
        scales = [
            pools.exponents(std) if is_fp4 else pools.scales("BF16", RMS_4, std) for std in (w13_std, w2_std)
        ]
        sources = (pools.codes4(), scales[0], pools.codes4(), scales[1])
    else:
        tiles = request.cpu_layout
        record = tiles.expert_record(hidden, inner, experts.gated)
        sources = (pools.tiles(tiles, w13_std), None, pools.tiles(tiles, w2_std), None)
    for expert in range(blob.shape[0]):
        yield from record_pieces(record, sources, f"{blob.name}\0{expert}")


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
