"""What a conversion will write and in which order: a pure function of settings and source headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from krasis.convert.settings import ConvertSettings
from krasis.convert.slices import FLOAT_BYTES
from krasis.convert.sources import WeightSource
from krasis.formats.architecture import Architecture
from krasis.formats.bundle.shard_plan import BlobSpec, PlacedBlob, ShardFile, ShardPlan, plan_shards
from krasis.formats.errors import ResourceError, UsageError
from krasis.formats.layouts import Int8RowsLayout, padded_rows
from krasis.formats.layouts.expert_record import ExpertRecord

# Vectors and small matrices that keep their own precision, per layer.
PLAIN_LAYER = ("attention.q_norm", "attention.k_norm", "attention.norm", "experts.norm", "experts.router")

_MIB = 1 << 20
# The interpreter, NumPy, HDF5, thread stacks, the parsed headers of thousands of tensors.
BASE_BYTES = 320 * _MIB
# Buffers of packed experts between packer and writer, as (number, bytes of each), best first. Large ones make
# large writes; a buffer holds at least one expert.
STAGING_CHOICES = ((4, 32 * _MIB), (3, 32 * _MIB), (2, 32 * _MIB), (2, 8 * _MIB), (2, 0))
DECODE_BYTES = 512 * _MIB
CHUNK_BYTES = 32 * _MIB  # of float32 decoded at once from a dense tensor


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of work that a resume skips: written, synced and journalled as a whole.

    kind: ``dense`` (layer None: the model's own tensors), ``gpu`` or ``cpu``. source_bytes: read for it;
    new_bytes: of these, what no unit before it reads.
    """

    name: str
    kind: Literal["dense", "gpu", "cpu"]
    layer: int | None
    blobs: tuple[str, ...]
    source_bytes: int
    new_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Buffers of the pipeline.

    staging_slots: buffers of slot_bytes for packed experts. decode_slots: experts dequantised ahead.
    """

    staging_slots: int
    slot_bytes: int
    decode_slots: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Sources by role, blobs with their places, units in order, and the memory it takes."""

    architecture: Architecture
    settings: ConvertSettings
    dense_source: WeightSource
    gpu_source: WeightSource
    cpu_source: WeightSource
    shards: ShardPlan
    blobs: tuple[BlobSpec, ...]
    units: tuple[Unit, ...]
    memory: MemoryPlan

    @property
    def source_bytes(self) -> int:
        """Bytes read from the sources by all units (a tensor used by two tiers counts twice)."""
        return sum(unit.source_bytes for unit in self.units)

    @property
    def input_bytes(self) -> int:
        """Bytes of the sources that are read at all (a tensor used by two tiers counts once)."""
        return sum(unit.new_bytes for unit in self.units)

    def places(self) -> dict[str, tuple[ShardFile, PlacedBlob]]:
        """Blob name to its shard and its place there."""
        return {blob.spec.name: (file, blob) for file in self.shards.files for blob in file.blobs}

    def tier_bytes(self) -> dict[str, int]:
        """Payload per tier."""
        sizes: dict[str, int] = {}
        for blob in self.blobs:
            sizes[blob.tier] = sizes.get(blob.tier, 0) + blob.num_bytes
        return sizes

    def expert_source(self, tier: str) -> WeightSource:
        """The model that a tier's experts come from."""
        return self.gpu_source if tier == "gpu" else self.cpu_source


def plain_dtype(dtype: str) -> str:
    """The type a plain blob keeps: its own, or F32 (exact) for a quantised source."""
    return dtype if dtype in FLOAT_BYTES else "F32"


def expert_record(architecture: Architecture, settings: ConvertSettings, tier: str) -> ExpertRecord:
    """Sections and size of one packed expert."""
    layout = settings.layout(tier)
    return layout.expert_record(architecture.hidden_size, architecture.expert_intermediate_size)


def plan_conversion(
    hf: WeightSource | None,
    gguf: WeightSource | None,
    settings: ConvertSettings,
    usable_bytes: int | None = None,
) -> ConversionPlan:
    """Decides which source gives what, and lays everything out.

    Dense tensors and GPU experts come from the Hugging Face checkpoint when there is one, CPU experts from
    the GGUF. usable_bytes: memory that buffers shall be made shallower for. Raises UsageError without a
    source or for a group that does not divide the model's sizes, ResourceError when the buffers exceed
    ``settings.memory_limit_bytes``.
    """
    dense_source = hf or gguf
    cpu_source = gguf or hf
    if dense_source is None or cpu_source is None:
        raise UsageError("no input model")
    arch = dense_source.architecture
    check_groups(arch, settings)
    blobs = (*_dense_blobs(arch, dense_source), *_expert_blobs(arch, settings))
    units = tuple(_units(arch, settings, dense_source, {"gpu": dense_source, "cpu": cpu_source}))
    return ConversionPlan(
        architecture=arch,
        settings=settings,
        dense_source=dense_source,
        gpu_source=dense_source,
        cpu_source=cpu_source,
        shards=plan_shards(blobs, settings.shard_bytes),
        blobs=blobs,
        units=units,
        memory=plan_memory(arch, settings, dense_source, cpu_source, usable_bytes),
    )


def check_groups(arch: Architecture, settings: ConvertSettings) -> None:
    """Raises UsageError when a scale group does not divide the experts' input features."""
    group = settings.gpu_group
    if "gpu" not in settings.tiers or group is None:
        return
    for what, size in (("hidden size", arch.hidden_size), ("expert size", arch.expert_intermediate_size)):
        if size % group:
            fitting = [
                g for g in (128, 64, 32) if arch.hidden_size % g == arch.expert_intermediate_size % g == 0
            ]
            raise UsageError(
                f"--gpu-group {group} does not divide the model's {what}",
                got=size,
                hint=f"use --gpu-group {fitting[0] if fitting else 'channel'}",
            )


def plan_memory(
    arch: Architecture,
    settings: ConvertSettings,
    dense_source: WeightSource,
    cpu_source: WeightSource,
    usable_bytes: int | None = None,
) -> MemoryPlan:
    """The deepest buffers within the usual budget, shallower under ``memory_limit_bytes``, or where that is
    not set under usable_bytes, down to the least. Pure.
    """
    limit = usable_bytes if settings.memory_limit_bytes is None else settings.memory_limit_bytes
    record_bytes = max(expert_record(arch, settings, tier).record_bytes for tier in settings.tiers)
    expert_floats = 3 * arch.hidden_size * arch.expert_intermediate_size * 4
    # The gguf package builds each matrix twice while it dequantises it.
    decode_bytes = 2 * expert_floats if _decodes(settings, dense_source, cpu_source) else 0
    most = max(1, min(8, DECODE_BYTES // decode_bytes)) if decode_bytes else 0
    fixed = BASE_BYTES + _dense_buffer_bytes(arch)
    smallest = 0
    for slots, slab_bytes in STAGING_CHOICES:
        slot_bytes = max(record_bytes, slab_bytes)
        for decode_slots in range(most, min(most, 1) - 1, -1):
            smallest = fixed + slots * slot_bytes + decode_slots * decode_bytes
            plan = MemoryPlan(slots, slot_bytes, decode_slots, smallest)
            if limit is None or smallest <= limit:
                return plan
    if settings.memory_limit_bytes is None:
        return plan  # the least there is; whoever begins the work refuses it
    raise ResourceError(
        "the memory limit is too small for this model",
        got=f"{(settings.memory_limit_bytes or 0) / _MIB:.0f} MiB allowed",
        limit=f"{smallest / _MIB:.0f} MiB needed",
        hint="raise --memory-limit",
    )


def _decodes(settings: ConvertSettings, dense_source: WeightSource, cpu_source: WeightSource) -> bool:
    """Whether any expert is dequantised to float32 on the way."""
    sources = {"gpu": dense_source, "cpu": cpu_source}
    for tier in settings.tiers:
        kept = {*FLOAT_BYTES, "Q8_0"} if settings.keeps_q8_0(tier) else {*FLOAT_BYTES}
        if set(sources[tier].expert_types()) - kept:
            return True
    return False


def _dense_buffer_bytes(arch: Architecture) -> int:
    qkv = arch.qkv_rows * arch.hidden_size
    output = arch.hidden_size * arch.attention_size
    return max(qkv, output) + 4 * CHUNK_BYTES + 4 * padded_rows(arch.vocab_size)


def _dense_blobs(arch: Architecture, source: WeightSource) -> Iterable[BlobSpec]:
    layout = Int8RowsLayout()

    def plain(name: str, shape: tuple[int, ...], dtype: str) -> BlobSpec:
        return BlobSpec(name, "dense", dtype, shape, "plain")

    def int8(name: str, n: int, k: int) -> Iterable[BlobSpec]:
        yield BlobSpec(name, "dense", "I8", layout.codes_shape(n, k), layout.layout_id)
        yield plain(f"{name}.scale", (n,), "F32")

    hidden = arch.hidden_size
    yield plain("embedding", (arch.vocab_size, hidden), plain_dtype(source.dense("embedding").dtype))
    for i in range(arch.num_layers):
        yield from int8(f"layers.{i}.attention.qkv", arch.qkv_rows, hidden)
        yield from int8(f"layers.{i}.attention.output", hidden, arch.attention_size)
        for ours in PLAIN_LAYER:
            piece = source.dense(ours, i)
            yield plain(f"layers.{i}.{ours}", piece.shape, plain_dtype(piece.dtype))
    yield plain("final_norm", (hidden,), plain_dtype(source.dense("final_norm").dtype))
    yield from int8("lm_head", padded_rows(arch.vocab_size), hidden)


def _expert_blobs(arch: Architecture, settings: ConvertSettings) -> Iterable[BlobSpec]:
    ids = settings.layouts()
    for tier in settings.tiers:
        record_bytes = expert_record(arch, settings, tier).record_bytes
        for i in range(arch.num_layers):
            yield BlobSpec(
                f"layers.{i}.experts.{tier}", tier, "U8", (arch.num_experts, record_bytes), ids[tier]
            )


def _units(
    arch: Architecture, settings: ConvertSettings, dense: WeightSource, experts: dict[str, WeightSource]
) -> Iterable[Unit]:
    top = ("embedding", "final_norm", "lm_head", "lm_head.scale")
    parts = [dense.dense(ours) for ours in ("embedding", "final_norm", "lm_head")]
    once = {piece.tensor: piece.raw.nbytes for piece in parts}  # a tied head is the embedding
    yield Unit("model", "dense", None, top, sum(piece.raw.nbytes for piece in parts), sum(once.values()))
    int8 = ("attention.qkv", "attention.qkv.scale", "attention.output", "attention.output.scale")
    matrices = ("attention.q", "attention.k", "attention.v", "attention.output")
    for i in range(arch.num_layers):
        names = tuple(f"layers.{i}.{part}" for part in (*int8, *PLAIN_LAYER))
        num_bytes = sum(dense.dense(part, i).raw.nbytes for part in (*matrices, *PLAIN_LAYER))
        yield Unit(f"layers.{i}.dense", "dense", i, names, num_bytes, num_bytes)
        seen: list[WeightSource] = []
        for tier in settings.tiers:
            source = experts[tier]
            num_bytes = source.expert_bytes(i)
            new_bytes = 0 if source in seen else num_bytes
            seen.append(source)
            blobs = (f"layers.{i}.experts.{tier}",)
            yield Unit(f"layers.{i}.{tier}", tier, i, blobs, num_bytes, new_bytes)
