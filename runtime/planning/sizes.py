"""What a model weighs: per layer, per expert, per tier, per token. From a bundle's manifest, or from a
model's description alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from krasis.formats.bundle.manifest_records import TABLE_TIER
from krasis.formats.errors import UnsupportedModelError, UsageError
from krasis.formats.models import tensors
from krasis.formats.models.record import MAX_POSITIONS
from krasis.formats.models.spec import Layer, ModelSpec
from krasis.formats.models.state import SNAPSHOTS, Windows, copy_bytes, fixed_bytes, layer_state
from krasis.formats.models.tensors import blobs, layer_tensors, table_tensors
from krasis.runtime.planning.assumptions import GROUPED_SHARE, MXFP4_GROUPED_SHARE
from krasis.runtime.planning.kv_form import gpu_windows, kv_scratch_bytes, planned_kv_dtype
from krasis.runtime.planning.shape import ModelShape, largest_shape, shape_of

if TYPE_CHECKING:
    from krasis.formats.bundle.manifest import Manifest

DEFAULT_GPU_LAYOUT = "marlin-u4b8-g128-bf16"
DEFAULT_CPU_LAYOUT = "cpu-q8-r32-b32"
MXFP4_CPU_LAYOUT = "cpu-mxfp4-r32-b32"
MXFP4_GPU_LAYOUT = "marlin-e2m1-g32-e8m0"
KV_DTYPE_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "int8": 1}
EMBEDDING_BLOB = "embedding"
# Norms, router and embedding keep their own precision: 16 bits in nearly every published checkpoint.
_DTYPE_BYTES = {"I8": 1, "F32": 4, "I32": 4, None: 2}


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights. ``active`` are those that one token meets (embedding: one row is read, all are
    counted).
    """

    total: int
    active: int
    experts: int


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """The routed experts of one layer, of which each token takes ``top_k``.

    weights: of one expert. gpu_bytes, cpu_bytes: one expert in that tier, padding included; 0: no such tier.
    products_share: of a GPU's matmul rate, that its grouped products reach.
    """

    count: int
    top_k: int
    weights: int
    gpu_bytes: int
    cpu_bytes: int
    products_share: float = GROUPED_SHARE


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """``count`` layers that are alike, each with this.

    dense_bytes: what every token reads of one (mixer, norms, router, dense and shared MLPs). dense_macs:
    multiply-adds of a token with these. experts: None in layers without any.
    """

    layer: Layer
    count: int
    dense_bytes: int
    dense_macs: int
    experts: ExpertSizes | None


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model's parts.

    layers: the kinds of layers, each once with its number. end_bytes: final norm and head, which every token
    reads too. embedding_bytes: the table of which a token looks up one row. table_bytes: hashed n-gram
    tables, which stay on the disk.
    """

    spec: ModelSpec
    layers: tuple[LayerSizes, ...]
    end_bytes: int
    embedding_bytes: int
    gpu_layout: str
    cpu_layout: str
    source: Literal["bundle", "shape"]
    table_bytes: int = 0

    def __post_init__(self) -> None:
        if not any(kind.experts for kind in self.layers):
            raise UnsupportedModelError(
                "plans are of models with routed experts", got=f"{self.spec.family} without experts"
            )

    @property
    def shape(self) -> ModelShape:
        """The sizes that GPU buffers are made for. Raises as ``shape_of``."""
        return shape_of(self.spec)

    @property
    def largest(self) -> ModelShape:
        """The sizes that have room for every layer."""
        return largest_shape(self.spec)

    @property
    def num_layers(self) -> int:
        """Layers of all kinds."""
        return sum(kind.count for kind in self.layers)

    @property
    def expert_layers(self) -> Iterator[tuple[int, ExpertSizes]]:
        """The kinds of layers that have experts: their number, and the experts of one."""
        return ((kind.count, kind.experts) for kind in self.layers if kind.experts is not None)

    @property
    def num_expert_layers(self) -> int:
        """Layers that have experts."""
        return sum(count for count, _ in self.expert_layers)

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(count * experts.count for count, experts in self.expert_layers)

    @property
    def most_experts(self) -> int:
        """Experts of the layer that has most."""
        return max(experts.count for _, experts in self.expert_layers)

    @property
    def dense_bytes(self) -> int:
        """What every token reads: all but experts and embedding table."""
        return self.end_bytes + sum(kind.count * kind.dense_bytes for kind in self.layers)

    @property
    def gpu_expert_bytes(self) -> int:
        """One expert in its GPU form, of the largest: what a slot has to hold. 0: no such tier."""
        return max(experts.gpu_bytes for _, experts in self.expert_layers)

    @property
    def cpu_expert_bytes(self) -> int:
        """One expert in its CPU form, of the largest. 0: no such tier."""
        return max(experts.cpu_bytes for _, experts in self.expert_layers)

    @property
    def gpu_experts_bytes(self) -> int:
        """All experts in their GPU form."""
        return sum(count * experts.count * experts.gpu_bytes for count, experts in self.expert_layers)

    @property
    def cpu_experts_bytes(self) -> int:
        """All experts in their CPU form."""
        return sum(count * experts.count * experts.cpu_bytes for count, experts in self.expert_layers)

    @property
    def routed_cpu_bytes(self) -> int:
        """What a token reads of the experts in their CPU form."""
        return sum(count * experts.top_k * experts.cpu_bytes for count, experts in self.expert_layers)

    @property
    def looked_up_bytes(self) -> int:
        """What a token looks up in hashed tables."""
        table = self.spec.ngram
        return 0 if table is None else self.table_bytes * table.dim // (table.rows * table.row_dim)

    def read_bytes(self, kind: LayerSizes) -> float:
        """What a pass reads for one layer of that kind, with its share of what follows the layers."""
        return (self.num_layers * kind.dense_bytes + self.end_bytes) / self.num_layers

    def kv_bytes(self, num_tokens: int, kv_dtype: str, windows: Windows = "seen") -> int:
        """What a sequence of ``num_tokens`` tokens keeps in all layers: keys and values, of windows what is
        said, and states. Raises UsageError for an unknown dtype.
        """
        item_bytes = _kv_item_bytes(kv_dtype)
        return sum(
            kind.count * layer_state(self.spec, kind.layer, item_bytes).bytes_for(num_tokens, windows)
            for kind in self.layers
        )

    def snapshot_bytes(self, num_tokens: int, kv_dtype: str, windows: Windows) -> int:
        """The copies that a sequence keeps of what its tokens overwrite: nothing of whole windows."""
        if windows == "whole":
            return SNAPSHOTS * fixed_bytes(self.spec)
        return SNAPSHOTS * copy_bytes(self.spec, num_tokens, _kv_item_bytes(kv_dtype))

    def sequence_bytes(self, num_tokens: int, kv_dtype: str, windows: Windows) -> int:
        """Memory of a sequence of up to so many tokens, with the copies that it may keep. Raises as
        ``kv_bytes``."""
        return self.kv_bytes(num_tokens, kv_dtype, windows) + self.snapshot_bytes(
            num_tokens, kv_dtype, windows
        )

    def gpu_kv_bytes(self, num_tokens: int, kv_dtype: str, num_gpus: int = 1) -> int:
        """What each of so many GPUs takes for one sequence's cache of so many positions, with what computing
        with 8 bits needs."""
        kv_dtype = planned_kv_dtype(self.spec, kv_dtype)
        scratch = kv_scratch_bytes(self.spec, num_tokens) if kv_dtype == "int8" else 0
        return self.sequence_bytes(num_tokens, kv_dtype, gpu_windows(self.spec, num_gpus)) + scratch

    def tokens_within(self, room_bytes: float, kv_dtype: str, num_gpus: int = 1) -> int:
        """The longest sequence that keeps no more than that on each of so many GPUs, whatever the model's
        positions."""
        windows = gpu_windows(self.spec, num_gpus)
        low, high = 0, MAX_POSITIONS
        while low < high:
            middle = (low + high + 1) // 2
            if self.sequence_bytes(middle, kv_dtype, windows) <= room_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def _kv_item_bytes(kv_dtype: str) -> int:
    if kv_dtype not in KV_DTYPE_BYTES:
        raise UsageError("unknown KV dtype", got=kv_dtype, limit=", ".join(KV_DTYPE_BYTES))
    return KV_DTYPE_BYTES[kv_dtype]


def count_parameters(spec: ModelSpec) -> Parameters:
    """Total, active and expert weights, as the checkpoint counts them (a tied head is counted once)."""
    counted = tensors.count_parameters(spec)
    # There one row of the embedding is active; a tied one is counted once, as the head, of which all is.
    looked_up = (0 if spec.tied else spec.vocab * spec.hidden) - spec.hidden
    experts = sum(
        math.prod(tensor.shape)
        for layer in spec.layers
        for tensor in layer_tensors(spec, layer)
        if tensor.store == "experts" or tensor.per_expert
    )
    return Parameters(counted.total, counted.active + looked_up, experts)


def sizes_of_shape(
    spec: ModelSpec, gpu_layout: str | None = None, cpu_layout: str | None = None
) -> ModelSizes:
    """The sizes that a bundle of this model will have. gpu_layout, cpu_layout: None for what it is converted
    to by default: a group that divides the model's sizes; what its experts were released in.

    Raises FormatError for an unknown layout id, UnsupportedModelError for a model without experts or with
    experts that the layouts cannot hold.
    """
    dense = _dense_bytes(
        (blob.name, math.prod(blob.shape) * _DTYPE_BYTES[blob.dtype]) for blob in blobs(spec)
    )
    if gpu_layout is None:
        gpu_layout = default_gpu_layout(spec)
    if cpu_layout is None:
        cpu_layout = _default_cpu_layout(spec)
    records: dict[tuple[str, int, int, bool], int] = {}

    def record_bytes(tier: str, index: int) -> int:
        experts = spec.layers[index].experts
        if experts is None:
            return 0
        width = experts.width(spec.hidden)
        key = (gpu_layout if tier == "gpu" else cpu_layout, width, experts.intermediate, experts.gated)
        if key not in records:
            records[key] = _record_bytes(*key)
        return records[key]

    tables = sum(math.prod(one.shape) * _DTYPE_BYTES[None] for _, one in table_tensors(spec))
    names = {"gpu_layout": gpu_layout, "cpu_layout": cpu_layout}
    return _sizes(spec, dense, record_bytes, **names, source="shape", table_bytes=tables)


def _default_cpu_layout(spec: ModelSpec) -> str:
    return MXFP4_CPU_LAYOUT if _released_in_mxfp4(spec) else DEFAULT_CPU_LAYOUT


def _released_in_mxfp4(spec: ModelSpec) -> bool:
    from krasis.formats.models.registry import family_names, family_of

    return spec.family in family_names() and family_of(spec).released_in == "MXFP4"


def default_gpu_layout(spec: ModelSpec) -> str:
    """What the GPU's experts are converted to if nothing else is asked for: what they were released in, or
    INT4 in the largest group that divides their sizes. Raises UnsupportedModelError if none does.
    """
    from krasis.formats.layouts import expert_format

    if _released_in_mxfp4(spec):
        return MXFP4_GPU_LAYOUT
    found = [layer.experts for layer in spec.layers if layer.experts is not None]
    widths = {spec.hidden if one.latent is None else one.latent for one in found}
    inputs = sorted(widths | {one.intermediate for one in found})
    return expert_format(DEFAULT_GPU_LAYOUT).fitted(inputs).layout_id


def _record_bytes(layout_id: str, width: int, intermediate: int, gated: bool) -> int:
    from krasis.formats.layouts import expert_format

    return expert_format(layout_id).expert_record(width, intermediate, gated).record_bytes


def sizes_of_bundle(manifest: Manifest) -> ModelSizes:
    """The sizes that a bundle has, from its blob table. Raises UnsupportedModelError for a model without
    experts.
    """
    spec = manifest.spec.main
    dense = _dense_bytes((blob.name, blob.num_bytes) for blob in manifest.blobs if blob.tier == "dense")
    tiers: dict[tuple[str, str], int] = defaultdict(int)
    for blob in manifest.blobs:
        if blob.tier != "dense":
            tiers[blob.tier, _place(blob.name)] += blob.num_bytes

    def record_bytes(tier: str, index: int) -> int:
        experts = spec.layers[index].experts
        return tiers[tier, str(index)] // experts.count if experts is not None else 0

    layouts = {f"{tier}_layout": manifest.layouts.get(tier, "") for tier in ("gpu", "cpu")}
    tables = sum(num_bytes for (tier, _), num_bytes in tiers.items() if tier == TABLE_TIER)
    return _sizes(spec, dense, record_bytes, **layouts, source="bundle", table_bytes=tables)


def _place(name: str) -> str:
    """The layer in a blob's name; ``embedding`` and ``end`` stand for the others'."""
    if name.startswith("layers."):
        return name.split(".")[1]
    return EMBEDDING_BLOB if name == EMBEDDING_BLOB else "end"


def _dense_bytes(sized: Iterable[tuple[str, int]]) -> Mapping[str, int]:
    """Bytes by ``_place``."""
    places: dict[str, int] = defaultdict(int)
    for name, num_bytes in sized:
        places[_place(name)] += num_bytes
    return places


def _sizes(
    spec: ModelSpec, dense: Mapping[str, int], record_bytes: Callable[[str, int], int], **others: Any
) -> ModelSizes:
    """Layers that are alike are put together. record_bytes: of one expert, by tier and layer."""
    numbers: dict[tuple[Layer, int, int, int], int] = defaultdict(int)
    for index, layer in enumerate(spec.layers):
        records = (record_bytes(tier, index) for tier in ("gpu", "cpu"))
        numbers[layer, dense[str(index)], *records] += 1  # type: ignore[index]
    share = MXFP4_GROUPED_SHARE if others["gpu_layout"] == MXFP4_GPU_LAYOUT else GROUPED_SHARE
    layers = tuple(_layer(spec, share, count, *kind) for kind, count in numbers.items())
    return ModelSizes(
        spec=spec, layers=layers, end_bytes=dense["end"], embedding_bytes=dense[EMBEDDING_BLOB], **others
    )


def _layer(
    spec: ModelSpec, share: float, count: int, layer: Layer, dense_bytes: int, gpu_bytes: int, cpu_bytes: int
) -> LayerSizes:
    experts, listed = layer.experts, layer_tensors(spec, layer)
    sizes = None
    if experts is not None:
        weights = sum(
            math.prod(one.shape[1:]) for one in listed if one.store == "experts" and len(one.shape) == 3
        )
        sizes = ExpertSizes(experts.count, experts.router.top_k, weights, gpu_bytes, cpu_bytes, share)
    macs = sum(
        math.prod(one.shape)
        for one in listed
        if len(one.shape) == 2 and one.store not in ("experts", "table", "ids") and not one.per_expert
    )
    return LayerSizes(layer, count, dense_bytes, macs, sizes)
