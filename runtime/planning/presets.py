"""Published shapes, so that a plan needs no model on disk (``krasis-info --plan --shape NAME``)."""

from __future__ import annotations

from krasis.formats.architecture_record import Architecture, RopeScaling
from krasis.formats.errors import UsageError


def _qwen3_moe(
    num_layers: int, hidden_size: int, num_heads: int, expert_intermediate_size: int
) -> Architecture:
    return Architecture(
        model_type="qwen3_moe",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_token=8,
        expert_intermediate_size=expert_intermediate_size,
        vocab_size=151936,
        max_positions=40960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=RopeScaling(),
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


SHAPES = {
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 64, 1536),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 32, 768),
}


def shape(name: str) -> Architecture:
    """The architecture called ``name``. Raises UsageError that lists the known ones."""
    try:
        return SHAPES[name.lower()]
    except KeyError:
        raise UsageError("unknown shape", where="--shape", got=repr(name), limit=", ".join(SHAPES)) from None
