"""What a model weighs: per expert, per tier, per token. From a bundle's manifest, or from an architecture
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from krasis.formats.architecture_record import Architecture
from krasis.formats.errors import FormatError, UsageError

if TYPE_CHECKING:
    from krasis.formats.bundle.manifest import Manifest

DEFAULT_GPU_LAYOUT = "marlin-u4b8-g128-bf16"
DEFAULT_CPU_LAYOUT = "cpu-q8-r32-b32"
KV_DTYPE_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
EMBEDDING_BLOB = "embedding"
# Norms, router and embedding keep their own precision: 16 bits in every published checkpoint of the family.
_OWN_DTYPE_BYTES = 2


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

    dense_bytes: what every token reads (attention, norms, router, head), without the embedding table.
    gpu_expert_bytes, cpu_expert_bytes: one expert of one layer in that tier, padding included; 0: no such
    tier.
    """

    architecture: Architecture
    dense_bytes: int
    embedding_bytes: int
    gpu_expert_bytes: int
    cpu_expert_bytes: int
    gpu_layout: str
    cpu_layout: str
    source: Literal["bundle", "shape"]

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return self.architecture.num_layers * self.architecture.num_experts

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
        arch = self.architecture
        row = 2 * arch.num_kv_heads * arch.head_dim * KV_DTYPE_BYTES[kv_dtype]
        return arch.num_layers * num_tokens * row


def expert_weights(arch: Architecture) -> int:
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
    arch: Architecture, gpu_layout: str = DEFAULT_GPU_LAYOUT, cpu_layout: str = DEFAULT_CPU_LAYOUT
) -> ModelSizes:
    """The sizes that a bundle of this architecture will have. Raises FormatError for an unknown layout id."""
    from krasis.formats.layouts import padded_rows

    head_rows = padded_rows(arch.vocab_size)
    int8_rows = arch.num_layers * (arch.qkv_rows + arch.hidden_size) + head_rows
    int8_codes = arch.num_layers * attention_weights(arch) + head_rows * arch.hidden_size
    own = arch.num_layers * (arch.num_experts * arch.hidden_size + 2 * arch.hidden_size + 2 * arch.head_dim)
    own += arch.hidden_size
    return ModelSizes(
        architecture=arch,
        dense_bytes=int8_codes + 4 * int8_rows + _OWN_DTYPE_BYTES * own,
        embedding_bytes=_OWN_DTYPE_BYTES * arch.vocab_size * arch.hidden_size,
        gpu_expert_bytes=_record_bytes(gpu_layout, arch),
        cpu_expert_bytes=_record_bytes(cpu_layout, arch),
        gpu_layout=gpu_layout,
        cpu_layout=cpu_layout,
        source="shape",
    )


def _record_bytes(layout_id: str, arch: Architecture) -> int:
    from krasis.formats.layouts import CpuTileLayout, MarlinLayout, layout_from_id

    layout = layout_from_id(layout_id)
    if not isinstance(layout, MarlinLayout | CpuTileLayout):
        raise FormatError("not a layout of experts", got=layout_id)
    return layout.expert_record(arch.hidden_size, arch.expert_intermediate_size).record_bytes


def sizes_of_bundle(manifest: Manifest) -> ModelSizes:
    """The sizes that a bundle has, from its blob table."""
    arch = manifest.architecture
    embedding = sum(blob.num_bytes for blob in manifest.blobs if blob.name == EMBEDDING_BLOB)
    tier_bytes = {"dense": 0, "gpu": 0, "cpu": 0}
    for blob in manifest.blobs:
        tier_bytes[blob.tier] = tier_bytes.get(blob.tier, 0) + blob.num_bytes
    num_experts = arch.num_layers * arch.num_experts
    return ModelSizes(
        architecture=arch,
        dense_bytes=tier_bytes["dense"] - embedding,
        embedding_bytes=embedding,
        gpu_expert_bytes=tier_bytes["gpu"] // num_experts,
        cpu_expert_bytes=tier_bytes["cpu"] // num_experts,
        gpu_layout=manifest.layouts.get("gpu", ""),
        cpu_layout=manifest.layouts.get("cpu", ""),
        source="bundle",
    )
