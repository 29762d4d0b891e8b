"""What a model weighs: per expert, per tier, per token. From a bundle's manifest, or from an architecture
alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from krasis.formats.architecture_record import Architecture
from krasis.formats.errors import FormatError, UnsupportedModelError, UsageError
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.uniform import spec_of
from krasis.runtime.planning.shape import ModelShape, shape_of

if TYPE_CHECKING:
    from krasis.formats.bundle.manifest import Manifest

DEFAULT_GPU_LAYOUT = "marlin-u4b8-g128-bf16"
DEFAULT_CPU_LAYOUT = "cpu-q8-r32-b32"
KV_DTYPE_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
EMBEDDING_BLOB = "embedding"
# Norms, router and embedding keep their own precision: 16 bits in every published checkpoint of the family.
_OWN_DTYPE_BYTES = 2
_ITEM_BYTES = {"I8": 1, "F32": 4, "I32": 4}


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights. ``active`` are those that one token meets (embedding: one row is read, all are
    counted).
    """

    total: int
    active: int
    experts: int


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes of a model's parts.

    architecture: the flat record of a model that it can describe, the shape of any other. dense_bytes: what
    every token reads (attention, norms, router, shared and dense MLPs, head), without the embedding table.
    gpu_expert_bytes, cpu_expert_bytes: one expert of one layer in that tier, padding included; 0: no such
    tier.
    """

    architecture: Architecture | ModelShape
    dense_bytes: int
    embedding_bytes: int
    gpu_expert_bytes: int
    cpu_expert_bytes: int
    gpu_layout: str
    cpu_layout: str
    source: Literal["bundle", "shape"]

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return shape_of(self.architecture)

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return self.shape.num_expert_layers * self.shape.num_experts

    @property
    def gpu_experts_bytes(self) -> int:
        """All experts in their GPU form."""
        return self.num_experts * self.gpu_expert_bytes

    @property
    def cpu_experts_bytes(self) -> int:
        """All experts in their CPU form."""
        return self.num_experts * self.cpu_expert_bytes

    def kv_bytes(self, num_tokens: int, kv_dtype: str) -> int:
        """Keys and values of ``num_tokens`` positions in every layer. Raises UsageError for an unknown
        dtype.
        """
        if kv_dtype not in KV_DTYPE_BYTES:
            raise UsageError("unknown KV dtype", got=kv_dtype, limit=", ".join(KV_DTYPE_BYTES))
        return self.shape.kv_elements * num_tokens * KV_DTYPE_BYTES[kv_dtype]


def expert_weights(arch: Architecture | ModelShape) -> int:
    """Weights of one expert: gate, up and down."""
    return 3 * arch.hidden_size * arch.expert_intermediate_size


def attention_weights(arch: Architecture) -> int:
    """Weights of one layer's projections q, k, v and output."""
    return arch.hidden_size * (arch.qkv_rows + arch.attention_size)


def count_parameters(arch: Architecture) -> Parameters:
    """Total, active and expert weights, as the checkpoint counts them (a tied head is counted once)."""
    norms = 2 * arch.hidden_size + 2 * arch.head_dim
    router = arch.num_experts * arch.hidden_size
    heads = 1 if arch.tie_word_embeddings else 2
    shared = arch.num_layers * (attention_weights(arch) + norms + router)
    shared += heads * arch.vocab_size * arch.hidden_size + arch.hidden_size
    experts = arch.num_layers * arch.num_experts * expert_weights(arch)
    active = shared + arch.num_layers * arch.num_experts_per_token * expert_weights(arch)
    return Parameters(shared + experts, active, experts)


def sizes_of_shape(
    model: Architecture | ModelSpec,
    gpu_layout: str = DEFAULT_GPU_LAYOUT,
    cpu_layout: str = DEFAULT_CPU_LAYOUT,
) -> ModelSizes:
    """The sizes that a bundle of this model will have. Raises FormatError for an unknown layout id,
    UnsupportedModelError as ``shape_of``.
    """
    from krasis.formats.models.tensors import blobs

    shape = shape_of(model)
    dense = embedding = 0
    for blob in blobs(spec_of(model) if isinstance(model, Architecture) else model):
        item_bytes = _ITEM_BYTES[blob.dtype] if blob.dtype else _OWN_DTYPE_BYTES
        num_bytes = item_bytes * math.prod(blob.shape)
        if blob.name == EMBEDDING_BLOB:
            embedding += num_bytes
        else:
            dense += num_bytes
    return ModelSizes(
        architecture=model if isinstance(model, Architecture) else shape,
        dense_bytes=dense,
        embedding_bytes=embedding,
        gpu_expert_bytes=_record_bytes(gpu_layout, shape),
        cpu_expert_bytes=_record_bytes(cpu_layout, shape),
        gpu_layout=gpu_layout,
        cpu_layout=cpu_layout,
        source="shape",
    )


def _record_bytes(layout_id: str, arch: ModelShape) -> int:
    from krasis.formats.layouts import CpuTileLayout, MarlinLayout, layout_from_id

    layout = layout_from_id(layout_id)
    if not isinstance(layout, MarlinLayout | CpuTileLayout):
        raise FormatError("not a layout of experts", got=layout_id)
    return layout.expert_record(arch.hidden_size, arch.expert_intermediate_size).record_bytes


def _flat(manifest: Manifest, shape: ModelShape) -> Architecture | ModelShape:
    try:
        return manifest.architecture
    except UnsupportedModelError:
        return shape


def sizes_of_bundle(manifest: Manifest) -> ModelSizes:
    """The sizes that a bundle has, from its blob table."""
    spec = manifest.spec
    shape = shape_of(spec)
    embedding = sum(blob.num_bytes for blob in manifest.blobs if blob.name == EMBEDDING_BLOB)
    tier_bytes = {"dense": 0, "gpu": 0, "cpu": 0}
    for blob in manifest.blobs:
        tier_bytes[blob.tier] = tier_bytes.get(blob.tier, 0) + blob.num_bytes
    num_experts = shape.num_expert_layers * shape.num_experts
    return ModelSizes(
        architecture=_flat(manifest, shape),
        dense_bytes=tier_bytes["dense"] - embedding,
        embedding_bytes=embedding,
        gpu_expert_bytes=tier_bytes["gpu"] // num_experts,
        cpu_expert_bytes=tier_bytes["cpu"] // num_experts,
        gpu_layout=manifest.layouts.get("gpu", ""),
        cpu_layout=manifest.layouts.get("cpu", ""),
        source="bundle",
    )
