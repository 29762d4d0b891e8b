"""The tensors of MLPs, experts and routers."""

from __future__ import annotations

from collections.abc import Iterator

from krasis.formats.models.mlps import Experts, GatedMlp, MlpBesideExperts, Router
from krasis.formats.models.spec import Mlp, ModelSpec
from krasis.formats.models.tensor import Tensor, norm


def mlp_tensors(mlp: Mlp, spec: ModelSpec, normed: bool) -> Iterator[Tensor]:
    """The tensors of an MLP with the norm before it, in the order of a bundle."""
    if isinstance(mlp, GatedMlp):
        if normed:
            yield norm("mlp.norm", spec)
        yield from _gated("mlp", mlp, spec.hidden)
    elif isinstance(mlp, Experts):
        if normed:
            yield norm("experts.norm", spec)
        yield from _experts(mlp, spec)
    else:
        yield from _beside(mlp, spec)


def _beside(mlp: MlpBesideExperts, spec: ModelSpec) -> Iterator[Tensor]:
    yield norm("mlp.norm", spec)
    yield from _gated("mlp", mlp.mlp, spec.hidden)
    yield norm("mlp.own_post_norm", spec)
    yield norm("experts.norm", spec)
    yield from _experts(mlp.experts, spec)
    yield norm("experts.post_norm", spec)


def _gated(prefix: str, mlp: GatedMlp, hidden: int) -> Iterator[Tensor]:
    parts = ("gate", "up") if mlp.activation.gated else ("up",)
    rows = len(parts) * mlp.intermediate
    stacked = tuple(f"{prefix}.{part}_proj" for part in parts)  # shared.gate is another tensor
    yield Tensor(f"{prefix}.w13", (rows, hidden), "int8_rows", stacked)
    yield Tensor(f"{prefix}.w2", (hidden, mlp.intermediate), "int8_rows", (f"{prefix}.down_proj",))
    if mlp.bias:
        yield Tensor(f"{prefix}.w13.bias", (rows,), "f32", tuple(f"{part}.bias" for part in stacked))
        yield Tensor(f"{prefix}.w2.bias", (hidden,), "f32", (f"{prefix}.down_proj.bias",))


def _experts(mlp: Experts, spec: ModelSpec) -> Iterator[Tensor]:
    hidden = spec.hidden
    yield from _router(mlp.router, mlp.count, spec)
    if mlp.shared is not None:
        yield from _gated("shared", mlp.shared, hidden)
    if mlp.shared_gate:
        yield Tensor("shared.gate", (1, hidden), "plain")
    width = hidden if mlp.latent is None else mlp.latent
    if mlp.latent is not None:
        yield Tensor("experts.latent_input", (width, hidden), "int8_rows")
        yield Tensor("experts.latent_output", (hidden, width), "int8_rows")
    parts = ("gate", "up") if mlp.activation.gated else ("up",)
    rows = len(parts) * mlp.intermediate
    yield Tensor("experts.w13", (mlp.count, rows, width), "experts", parts)
    yield Tensor("experts.w2", (mlp.count, width, mlp.intermediate), "experts", ("down",))
    if mlp.bias:
        for part in parts:
            yield Tensor(f"experts.{part}.bias", (mlp.count, mlp.intermediate), "f32", per_expert=True)
        yield Tensor("experts.down.bias", (mlp.count, width), "f32", per_expert=True)


def _router(router: Router, count: int, spec: ModelSpec) -> Iterator[Tensor]:
    yield Tensor("experts.router", (count, spec.hidden), "plain")
    if router.bias:
        yield Tensor("experts.router.bias", (count,), "f32")
    if router.correction_bias:
        yield Tensor("experts.router.correction_bias", (count,), "f32")
    if router.input_norm:
        yield Tensor("experts.router.scale", (spec.hidden,), "f32")
    if router.expert_scale:
        yield Tensor("experts.router.expert_scale", (count,), "f32")
    if router.by_token:
        yield Tensor("experts.router.table", (spec.vocab, router.top_k), "ids")
