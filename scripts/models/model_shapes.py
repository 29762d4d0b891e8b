"""Sizes of the released models whose shapes are used for benchmarks and tests, and changes to them."""

from dataclasses import replace
from typing import Any, TypeVar

from scripts.models.family_shapes import BUNDLE_NAMES, NAMES, FamilyShape
from scripts.models.model_files import TINY_SHAPE, MoeShape, Shape

QWEN3_30B = MoeShape(
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    intermediate_size=6144,
    max_position_embeddings=40960,
    rope_theta=1_000_000.0,
    tie_word_embeddings=False,
)
QWEN3_SHAPES = {
    "qwen3-30b-a3b": QWEN3_30B,
    "qwen3-235b-a22b": replace(
        QWEN3_30B,
        hidden_size=4096,
        num_hidden_layers=94,
        num_attention_heads=64,
        moe_intermediate_size=1536,
        intermediate_size=12288,
    ),
    "tiny": TINY_SHAPE,
    "custom": TINY_SHAPE,
}
SHAPES: dict[str, Shape] = {**QWEN3_SHAPES, **{name: FamilyShape.named(name) for name in NAMES}}
# Checkpoints are written as transformers names their tensors, which here are fused.
BUNDLE_SHAPES = SHAPES | {name: FamilyShape.named(name) for name in BUNDLE_NAMES}


AnyShape = TypeVar("AnyShape", MoeShape, FamilyShape)


def apply_overrides(base: AnyShape, given: dict[str, Any], yarn: float | None) -> AnyShape:
    """The base shape with every option that was given. Raises ValueError for impossible sizes."""
    changes = {key: value for key, value in given.items() if value is not None}
    if isinstance(base, FamilyShape):
        if yarn is not None:
            raise ValueError("--yarn is for Qwen3-MoE shapes")
        return base.changed(changes)
    shape = replace(base, **changes)
    if yarn is None:
        return shape
    # Released models with YaRN state the stretched context as the one they take.
    positions = int(yarn * shape.yarn_original_positions)
    return replace(shape, yarn_factor=yarn, max_position_embeddings=positions)
