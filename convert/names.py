"""What the tensors of a Qwen3-MoE model are called and shaped: in our bundle, on the hub and in a GGUF.

The names are the family's own (``formats/models/families``). What a bundle stores of them is also spelled by
``plan.py`` (which blobs there are) and ``dense.py`` (which tensors are fused).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from krasis.formats.architecture import Architecture
from krasis.formats.layouts.expert_record import Part
from krasis.formats.models.families.qwen3_moe import FAMILY

PARTS: tuple[Part, ...] = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class DenseName:
    """One non-expert tensor. ``{i}`` stands for the layer; shape is in elements, ``[n, k]`` or ``[n]``."""

    ours: str
    hf: str
    gguf: str
    shape: tuple[str, ...]
    per_layer: bool = True


# Shapes by the name of an architecture property, or one of the sizes of dense_shape.
_SHAPES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "hidden"),
    "final_norm": ("hidden",),
    "lm_head": ("vocab", "hidden"),
    "attention.q": ("q", "hidden"),
    "attention.k": ("kv", "hidden"),
    "attention.v": ("kv", "hidden"),
    "attention.output": ("hidden", "q"),
    "attention.q_norm": ("head_dim",),
    "attention.k_norm": ("head_dim",),
    "attention.norm": ("hidden",),
    "experts.norm": ("hidden",),
    "experts.router": ("experts", "hidden"),
}


def _dense_name(ours: str, shape: tuple[str, ...]) -> DenseName:
    source = FAMILY.names[ours]
    return DenseName(ours, source.hf[0], source.gguf[0], shape, per_layer="{i}" in source.hf[0])


DENSE = tuple(_dense_name(ours, shape) for ours, shape in _SHAPES.items())
BY_OURS = {name.ours: name for name in DENSE}

HF_EXPERT = "model.layers.{i}.mlp.experts.{e}.{part}_proj.weight"
HF_FUSED_GATE_UP = "model.layers.{i}.mlp.experts.gate_up_proj"  # [experts, 2 * intermediate, hidden]
HF_FUSED_DOWN = "model.layers.{i}.mlp.experts.down_proj"  # [experts, hidden, intermediate]
GGUF_MERGED = "blk.{i}.ffn_{part}_exps.weight"  # [experts, n, k]
GGUF_FUSED_GATE_UP = "blk.{i}.ffn_gate_up_exps.weight"  # [experts, 2 * intermediate, hidden], gate first
GGUF_EXPERT = "blk.{i}.ffn_{part}.{e}.weight"

# Buffers that some exporters keep beside the weights; the runtime derives them from the config.
IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "rotary_emb.original_inv_freq",
    "rope_freqs.weight",
    "_extra_state",
)


def dense_shape(architecture: Architecture, name: DenseName) -> tuple[int, ...]:
    """Shape of a dense tensor in elements, as both file kinds give it (row-major, outputs first)."""
    sizes = {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "q": architecture.attention_size,
        "kv": architecture.num_kv_heads * architecture.head_dim,
        "head_dim": architecture.head_dim,
        "experts": architecture.num_experts,
    }
    return tuple(sizes[size] for size in name.shape)


def expert_shape(architecture: Architecture, part: Part) -> tuple[int, int]:
    """``(n, k)`` of one matrix: gate, up ``[intermediate, hidden]``, down ``[hidden, intermediate]``."""
    hidden, intermediate = architecture.hidden_size, architecture.expert_intermediate_size
    return (hidden, intermediate) if part == "down" else (intermediate, hidden)


def dense_keys(architecture: Architecture) -> Iterator[tuple[DenseName, int | None]]:
    """Every dense tensor a model must have, with its layer (None for the model's own).

    A tied head is left out.
    """
    for name in DENSE:
        if name.ours == "lm_head" and architecture.tie_word_embeddings:
            continue
        if not name.per_layer:
            yield name, None
            continue
        for layer in range(architecture.num_layers):
            yield name, layer
