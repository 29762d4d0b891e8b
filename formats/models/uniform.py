"""``Architecture`` as a view of a model whose layers are all alike, and the way back."""

from __future__ import annotations

from krasis.formats import architecture_record as old
from krasis.formats.architecture_record import Architecture, check_architecture, unsupported_model_type
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Experts, Router
from krasis.formats.models.rope import Rope, RopeScaling
from krasis.formats.models.spec import Layer, ModelSpec, Norm


def architecture_of(spec: ModelSpec, where: str) -> Architecture:
    """The flat record of a model that has no more to say than it. where: the source, for messages.

    Raises UnsupportedModelError for any other model and for sizes that the kernels cannot take, FormatError
    for impossible ones.
    """
    if spec.family not in old.SUPPORTED_MODEL_TYPES:
        raise unsupported_model_type(spec.family, f"{where}: model_type")
    mixer, mlp = spec.layers[0].mixer, spec.layers[0].mlp
    if not isinstance(mixer, Attention) or not isinstance(mlp, Experts) or mixer.rope is None:
        raise UnsupportedModelError("the layers are of another kind", where=where, limit=spec.family)
    architecture = Architecture(
        model_type=spec.family,
        num_layers=len(spec.layers),
        hidden_size=spec.hidden,
        num_heads=mixer.heads,
        num_kv_heads=mixer.kv_heads,
        head_dim=mixer.head_dim,
        num_experts=mlp.count,
        num_experts_per_token=mlp.router.top_k,
        expert_intermediate_size=mlp.intermediate,
        vocab_size=spec.vocab,
        max_positions=spec.max_positions,
        rms_norm_eps=spec.norm.eps,
        rope_theta=mixer.rope.theta,
        rope_scaling=_old_scaling(mixer.rope.scaling),
        norm_topk_prob=mlp.router.renormalise,
        tie_word_embeddings=spec.tied,
    )
    if spec_of(architecture) != spec:
        raise UnsupportedModelError(
            "the model has more than this version can do", where=where, got=spec.family
        )
    check_architecture(architecture, where)
    return architecture


def spec_of(architecture: Architecture) -> ModelSpec:
    """The model that the flat record describes."""
    head_dim = architecture.head_dim
    rope = Rope(head_dim, architecture.rope_theta, scaling=_new_scaling(architecture.rope_scaling))
    mixer = Attention(
        architecture.num_heads, architecture.num_kv_heads, head_dim, rope, head_dim**-0.5, qk_norm="head"
    )
    router = Router(architecture.num_experts_per_token, renormalise=architecture.norm_topk_prob)
    experts = Experts(architecture.num_experts, architecture.expert_intermediate_size, router)
    return ModelSpec(
        family=architecture.model_type,
        hidden=architecture.hidden_size,
        vocab=architecture.vocab_size,
        max_positions=architecture.max_positions,
        norm=Norm(architecture.rms_norm_eps),
        layers=(Layer(mixer, experts),) * architecture.num_layers,
        tied=architecture.tie_word_embeddings,
    )


def _old_scaling(scaling: RopeScaling) -> old.RopeScaling:
    return old.RopeScaling(
        kind=scaling.kind,
        factor=scaling.factor,
        original_max_positions=scaling.original_max_positions,
        attention_factor=scaling.attention_factor,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        truncate=scaling.truncate,
    )


def _new_scaling(scaling: old.RopeScaling) -> RopeScaling:
    kind = {"linear": "linear", "yarn": "yarn"}.get(scaling.kind, "none")
    return RopeScaling(
        kind,  # type: ignore[arg-type]
        scaling.factor,
        scaling.original_max_positions,
        scaling.attention_factor,
        scaling.beta_fast,
        scaling.beta_slow,
        scaling.truncate,
    )
