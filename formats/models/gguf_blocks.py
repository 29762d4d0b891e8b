"""Blocks that many families write into GGUF metadata in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.gguf import Keys
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Experts, GatedMlp, Router
from krasis.formats.models.spec import Layer, Mixer, ModelSpec, Norm

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_weights_scale": (1.0, 0.0),
    "leading_dense_block_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
}
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func


def refuse_gguf_features(keys: Keys, *names: str) -> None:
    """UnsupportedModelError for keys that would change the model. names: keys that other families have."""
    keys.expect("attention.sliding_window", 0)
    for name in names:
        keys.expect(name, *_NEUTRAL[name])
    if "expert_shared_count" in names:
        keys.expect("expert_group_count", *_NEUTRAL["expert_group_count"])
        keys.expect("expert_gating_func", SOFTMAX, 0)


def gguf_attention(
    keys: Keys,
    *,
    kv_heads: int | None = None,
    partial: bool = False,
    style: Literal["half", "interleaved"] = "half",
    **changes: Any,
) -> Attention:
    """Attention by the usual keys. kv_heads: of the layer, where there is a number for each. partial: fewer
    channels than a head has may be rotated. style: of the rotation, which the architecture implies."""
    heads = keys.size("attention.head_count")
    hidden = keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", default=max(1, hidden // heads))
    same = ("attention.value_length",) if partial else ("attention.value_length", "rope.dimension_count")
    for key in same:
        if (other := keys.size(key, default=head_dim)) != head_dim:
            raise UnsupportedModelError(
                "differs from the size of attention's keys", where=keys.path(key), got=other, limit=head_dim
            )
    dims = keys.size("rope.dimension_count", default=head_dim)
    if kv_heads is None:
        kv_heads = keys.size("attention.head_count_kv", default=heads)
    return Attention(heads, kv_heads, head_dim, keys.rope(dims, style), head_dim**-0.5, **changes)


def gguf_experts(
    keys: Keys,
    *,
    width: str = "expert_feed_forward_length",
    default_width: int | None = None,
    renormalise: bool = True,
    router: Router | None = None,
    **changes: Any,
) -> Experts:
    """Routed experts by the usual keys, with the shared ones as one MLP."""
    intermediate = keys.size(width, default=default_width)
    count = keys.size("expert_shared_count", default=0, least=0)
    fields: dict[str, Any] = {"shared": GatedMlp(intermediate * count) if count else None}
    return Experts(
        keys.size("expert_count"),
        intermediate,
        router or Router(keys.size("expert_used_count"), renormalise=renormalise),
        **fields | changes,
    )


def gguf_sigmoid_router(keys: Keys) -> Router:
    """A router of sigmoids with a correction bias and groups. llama.cpp writes group counts of 0 or 1 for
    none.
    """
    keys.expect("expert_gating_func", SIGMOID, 0)
    return Router(
        keys.size("expert_used_count"),
        "sigmoid",
        renormalise=keys.flag("expert_weights_norm", default=True),
        scale=keys.number("expert_weights_scale", default=1.0),
        correction_bias=True,
        groups=keys.size("expert_group_count", default=1, least=0) or 1,
        top_groups=keys.size("expert_group_used_count", default=1, least=0) or 1,
        sum_epsilon=1e-20,
    )


def gguf_layers(keys: Keys, mixer: Mixer, routed: Experts) -> list[Layer]:
    """All main layers: dense ones first; the drafting layers at the end of the blocks do not count."""
    drafting = keys.size("nextn_predict_layers", default=0, least=0)
    return gguf_layers_of(keys, [mixer] * (keys.size("block_count") - drafting), routed)


def gguf_layers_of(keys: Keys, mixers: Sequence[Mixer], routed: Experts) -> list[Layer]:
    """A layer a mixer, dense ones first."""
    first = keys.size("leading_dense_block_count", default=0, least=0)
    mlp = GatedMlp(keys.size("feed_forward_length")) if first else None
    return [Layer(mixer, mlp if mlp and i < first else routed) for i, mixer in enumerate(mixers)]


def gguf_model(keys: Keys, family: str, layers: Sequence[Layer], norm: Norm | None = None) -> ModelSpec:
    """The model of these layers. norm: where the usual key of its eps is not there."""
    hidden = keys.size("embedding_length")
    return ModelSpec(
        family=family,
        hidden=hidden,
        vocab=keys.vocab(hidden),
        max_positions=keys.size("context_length"),
        norm=norm or Norm(keys.number("attention.layer_norm_rms_epsilon")),
        layers=tuple(layers),
        tied=keys.tied,
        draft_layers=keys.size("nextn_predict_layers", default=0, least=0),
    )
