"""What a conversion will write and in which order: a pure function of settings and source headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from krasis.convert.hashed_tables import table_dtype
from krasis.convert.kept_codes import kept_codes
from krasis.convert.settings import ConvertSettings
from krasis.convert.source_parts import stacked_dtype
from krasis.convert.sources import WeightSource
from krasis.formats.bundle.blob_names import expert_blob
from krasis.formats.bundle.manifest_records import TABLE_TIER
from krasis.formats.bundle.shard_plan import BlobSpec, PlacedBlob, ShardFile, ShardPlan, plan_shards
from krasis.formats.checkpoints.quantised.kept import KeptCodes
from krasis.formats.errors import ResourceError, UsageError
from krasis.formats.layouts import Int8RowsLayout, padded_rows
from krasis.formats.layouts.expert_record import ExpertRecord
from krasis.formats.models.mlps import Experts
from krasis.formats.models.registry import family_of
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import blob_name, blobs_of, dense_tensors, dense_tensors_of, table_tensors

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

    kind: ``dense`` (layer None: the model's own tensors), ``gpu``, ``cpu`` or ``table`` (hashed n-grams).
    source_bytes: read for it; new_bytes: of these, what no unit before it reads.
    """

    name: str
    kind: Literal["dense", "gpu", "cpu", "table"]
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

    spec: ModelSpec
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


def expert_record(spec: ModelSpec, layer: int, settings: ConvertSettings, tier: str) -> ExpertRecord:
    """Sections and size of one packed expert of a layer."""
    experts = spec.experts_of(layer)
    return settings.layout(tier).expert_record(
        experts.width(spec.hidden), experts.intermediate, experts.gated
    )


def kinds_of_experts(spec: ModelSpec) -> dict[Experts, int]:
    """The different kinds of experts that layers have, each with the first layer that has them."""
    kinds: dict[Experts, int] = {}
    for layer in spec.expert_layers:
        kinds.setdefault(spec.experts_of(layer), layer)
    return kinds


def plan_conversion(
    hf: WeightSource | None,
    gguf: WeightSource | None,
    settings: ConvertSettings,
    usable_bytes: int | None = None,
) -> ConversionPlan:
    """Decides which source gives what, and lays everything out.

    Dense tensors and GPU experts come from the Hugging Face checkpoint when there is one, CPU experts from
    the GGUF. usable_bytes: memory that buffers shall be made shallower for. Raises UsageError without a
    source or for a given group that does not divide the model's sizes, ResourceError when the buffers exceed
    ``settings.memory_limit_bytes``.
    """
    dense_source = hf or gguf
    cpu_source = gguf or hf
    if dense_source is None or cpu_source is None:
        raise UsageError("no input model")
    spec = dense_source.spec
    kinds = kinds_of_experts(spec)
    inputs = (*(one.width(spec.hidden) for one in kinds), *(one.intermediate for one in kinds))
    gpu_codes = kept_codes(dense_source)
    if released_in_mxfp4(spec):
        gpu_codes = KeptCodes(mxfp4=True)
    settings = settings.fitted(inputs, kept_codes(cpu_source), gpu_codes)
    check_groups(spec, settings)
    blobs = (*_dense_blobs(spec, dense_source), *_expert_blobs(spec, settings), *_table_blobs(dense_source))
    units = tuple(_units(spec, settings, dense_source, {"gpu": dense_source, "cpu": cpu_source}))
    return ConversionPlan(
        spec=spec,
        settings=settings,
        dense_source=dense_source,
        gpu_source=dense_source,
        cpu_source=cpu_source,
        shards=plan_shards(blobs, settings.shard_bytes),
        blobs=blobs,
        units=units,
        memory=plan_memory(spec, settings, dense_source, cpu_source, usable_bytes),
    )


def rounds_mxfp4(spec: ModelSpec, settings: ConvertSettings) -> bool:
    """Whether the GPU's experts of a model that was released in MXFP4 are rounded a second time, to other 4
    bits."""
    layout = settings.gpu_layout
    other = layout.bits == 4 and layout.accepts("MXFP4") != "as is"
    return "gpu" in settings.tiers and released_in_mxfp4(spec) and other


def released_in_mxfp4(spec: ModelSpec) -> bool:
    """Whether the model's family was."""
    return family_of(spec).released_in == "MXFP4"


def check_groups(spec: ModelSpec, settings: ConvertSettings) -> None:
    """Raises UsageError when a scale group does not divide the experts' input features."""
    group = settings.gpu_group
    if "gpu" not in settings.tiers or group is None or group == "auto":
        return
    kinds = kinds_of_experts(spec)
    experts = [("expert size", one.intermediate) for one in kinds]
    sizes = [*(("hidden size", one.width(spec.hidden)) for one in kinds), *experts]
    for what, size in sizes:
        if size % group:
            fitting = [g for g in (128, 64, 32) if all(other % g == 0 for _, other in sizes)]
            raise UsageError(
                f"--gpu-group {group} does not divide the model's {what}",
                got=size,
                hint=f"use --gpu-group {fitting[0] if fitting else 'channel'}",
            )


def plan_memory(
    spec: ModelSpec,
    settings: ConvertSettings,
    dense_source: WeightSource,
    cpu_source: WeightSource,
    usable_bytes: int | None = None,
) -> MemoryPlan:
    """The deepest buffers within the usual budget, shallower under ``memory_limit_bytes``, or where that is
    not set under usable_bytes, down to the least. Pure.
    """
    limit = usable_bytes if settings.memory_limit_bytes is None else settings.memory_limit_bytes
    kinds = kinds_of_experts(spec)
    record_bytes = max(
        expert_record(spec, layer, settings, tier).record_bytes
        for layer in kinds.values()
        for tier in settings.tiers
    )
    expert_floats = 3 * spec.hidden * max(experts.intermediate for experts in kinds) * 4
    # The gguf package builds each matrix twice while it dequantises it.
    decode_bytes = 2 * expert_floats if _decodes(settings, dense_source, cpu_source) else 0
    most = max(1, min(8, DECODE_BYTES // decode_bytes)) if decode_bytes else 0
    fixed = BASE_BYTES + _dense_buffer_bytes(spec)
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
        layout = settings.layout(tier)
        if any(layout.accepts(dtype) == "decoded" for dtype in sources[tier].expert_types()):
            return True
    return False


def _dense_buffer_bytes(spec: ModelSpec) -> int:
    tensors = [tensor for layer, tensor in dense_tensors(spec) if layer is not None]
    largest = max(n * k for n, k in (one.shape for one in tensors if one.store == "int8_rows"))
    return largest + 4 * CHUNK_BYTES + 4 * padded_rows(spec.vocab)


def _dense_blobs(spec: ModelSpec, source: WeightSource) -> Iterable[BlobSpec]:
    layout_ids = {"plain": "plain", "int8_rows": Int8RowsLayout().layout_id}
    for layer, tensor in dense_tensors(spec):
        for blob in blobs_of(tensor, layer):
            dtype = blob.dtype or stacked_dtype(source.dense(tensor, layer))
            yield BlobSpec(blob.name, "dense", dtype, blob.shape, layout_ids[blob.layout])


def _expert_blobs(spec: ModelSpec, settings: ConvertSettings) -> Iterable[BlobSpec]:
    ids = settings.layouts()
    for tier in settings.tiers:
        for i in spec.expert_layers:
            shape = (spec.experts_of(i).count, expert_record(spec, i, settings, tier).record_bytes)
            yield BlobSpec(expert_blob(i, tier), tier, "U8", shape, ids[tier])


def _table_blobs(source: WeightSource) -> Iterable[BlobSpec]:
    for layer, tensor in table_tensors(source.spec):
        dtype = table_dtype(source.tables.parts(layer))
        yield BlobSpec(blob_name(tensor, layer), TABLE_TIER, dtype, tensor.shape, "plain")


def _table_unit(layer: int, source: WeightSource) -> Unit:
    num_bytes = sum(part.piece.raw.nbytes for part in source.tables.parts(layer))
    blobs = tuple(blob_name(tensor, at) for at, tensor in table_tensors(source.spec) if at == layer)
    return Unit(f"layers.{layer}.table", "table", layer, blobs, num_bytes, num_bytes)


def _units(
    spec: ModelSpec, settings: ConvertSettings, dense: WeightSource, experts: dict[str, WeightSource]
) -> Iterable[Unit]:
    yield _dense_unit("model", None, dense)
    for i in range(len(spec.layers)):
        yield _dense_unit(f"layers.{i}.dense", i, dense)
        if spec.layers[i].ngram:
            yield _table_unit(i, dense)
        if spec.layers[i].experts is None:
            continue
        seen: list[WeightSource] = []
        for tier in settings.tiers:
            source = experts[tier]
            num_bytes = source.expert_bytes(i)
            new_bytes = 0 if source in seen else num_bytes
            seen.append(source)
            yield Unit(f"layers.{i}.{tier}", tier, i, (expert_blob(i, tier),), num_bytes, new_bytes)


def _dense_unit(name: str, layer: int | None, source: WeightSource) -> Unit:
    tensors = dense_tensors_of(source.spec, layer)
    pieces = [part.piece for tensor in tensors for part in source.dense(tensor, layer)]
    once = {piece.tensor: piece.raw.nbytes for piece in pieces}  # a tied head is the embedding
    blobs = tuple(blob.name for tensor in tensors for blob in blobs_of(tensor, layer))
    num_bytes = sum(piece.raw.nbytes for piece in pieces)
    return Unit(name, "dense", layer, blobs, num_bytes, sum(once.values()))
