"""The one list of a model's tensors: their names in a bundle, shapes and how they are stored.

Converter, loaders, planner and counts iterate it; nothing else spells out what a block is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from krasis.formats.limits import align_up, checked_add, checked_mul
from krasis.formats.models.mixer_tensors import mixer_tensors
from krasis.formats.models.mlp_tensors import mlp_tensors
from krasis.formats.models.mlps import Experts, MlpBesideExperts
from krasis.formats.models.spec import Layer, ModelSpec, Residual
from krasis.formats.models.tensor import Tensor, norm

__all__ = [
    "Blob",
    "Tensor",
    "blob_name",
    "blobs",
    "blobs_of",
    "count_parameters",
    "dense_tensors",
    "dense_tensors_of",
    "layer_tensors",
    "table_tensors",
    "top_tensors",
]

TABLE = "ngram.table"
ROW_TILE = 32  # of the INT8 rows layout
_ROW_BYTES = 4


@dataclass(frozen=True, slots=True)
class Blob:
    """A tensor as a bundle stores it. dtype: None where a plain tensor keeps its source's."""

    name: str
    dtype: str | None
    shape: tuple[int, ...]
    layout: Literal["plain", "int8_rows"]


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights. active: those that one token's pass multiplies with or looks up."""

    total: int
    active: int


def layer_tensors(spec: ModelSpec, layer: Layer) -> tuple[Tensor, ...]:
    """A layer's tensors, named without the layer; mixer first, in the order of a bundle."""
    return tuple(_layer_tensors(spec, layer))


def _layer_tensors(spec: ModelSpec, layer: Layer) -> Iterator[Tensor]:
    if layer.drafts:
        yield from _draft_tensors(spec)
    if layer.ngram:
        yield from _ngram_tensors(spec)
    normed = spec.residual is None or spec.residual.kind != "gated"
    if layer.mixer is not None:
        yield from mixer_tensors(layer.mixer, spec, normed)
        if layer.post_norms:
            yield norm("attention.post_norm", spec)
        if spec.residual is not None:
            yield from _residual_tensors("attention.residual", spec.residual, spec.hidden)
    if layer.mlp is not None:
        yield from mlp_tensors(layer.mlp, spec, normed and not layer.parallel)
        if layer.post_norms:
            yield norm("mlp.post_norm", spec)
        if spec.residual is not None:
            yield from _residual_tensors("mlp.residual", spec.residual, spec.hidden)
    if layer.output_scale:
        yield Tensor("output_scale", (1,), "f32")


def _draft_tensors(spec: ModelSpec) -> Iterator[Tensor]:
    """What stands around a layer that drafts: its input is the projection of [norm of the embedding, norm of
    the model's hidden state], and its output is normed before the head.
    """
    yield norm("draft.embedding_norm", spec)
    yield norm("draft.hidden_norm", spec)
    yield Tensor("draft.projection", (spec.hidden, 2 * spec.hidden), "int8_rows")
    yield norm("draft.norm", spec)


def top_tensors(spec: ModelSpec) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The model's own tensors: those before the layers, and those after. A tied head is among them: bundles
    store it packed.
    """
    before = (Tensor("embedding", (spec.vocab, spec.hidden), "plain"),)
    head = Tensor("lm_head", (spec.vocab, spec.hidden), "int8_rows")
    return before, (*_end_tensors(spec), head)


def _end_tensors(spec: ModelSpec) -> Iterator[Tensor]:
    residual, hidden = spec.residual, spec.hidden
    if residual is None or residual.end == "mean":
        yield norm("final_norm", spec)
        return
    wide = residual.streams * hidden
    if residual.end == "mixer":
        yield from _gate_tensors("final_residual", residual, hidden)
        return
    yield norm("final_norm", spec)
    yield Tensor("final_residual.fn", (residual.streams, wide), "f32")
    yield Tensor("final_residual.base", (residual.streams,), "f32")
    yield Tensor("final_residual.scale", (1,), "f32")


def _residual_tensors(prefix: str, residual: Residual, hidden: int) -> Iterator[Tensor]:
    """Of one block's place in the streams."""
    streams, wide = residual.streams, residual.streams * hidden
    if residual.kind == "gated":
        yield from _gate_tensors(prefix, residual, hidden)
        yield Tensor(f"{prefix}.inject", (streams, wide), "f32")
        return
    mixed = (2 + streams) * streams
    yield Tensor(f"{prefix}.fn", (mixed, wide), "f32")
    yield Tensor(f"{prefix}.base", (mixed,), "f32")
    yield Tensor(f"{prefix}.scale", (3,), "f32")


def _gate_tensors(prefix: str, residual: Residual, hidden: int) -> Iterator[Tensor]:
    wide = residual.streams * hidden
    yield Tensor(f"{prefix}.norm", (wide,), "plain")
    yield Tensor(f"{prefix}.down", (residual.rank, wide), "plain")
    yield Tensor(f"{prefix}.up", (wide, residual.rank), "plain")


def _ngram_tensors(spec: ModelSpec) -> Iterator[Tensor]:
    table = spec.ngram
    if table is None:
        return
    wide = spec.residual_width
    yield Tensor(TABLE, (table.rows, table.row_dim), "table")
    yield Tensor("ngram.key", (wide, table.dim), "int8_rows")
    yield Tensor("ngram.value", (spec.hidden, table.dim), "int8_rows")
    for part in ("key_norm", "query_norm", "conv_norm"):
        yield Tensor(f"ngram.{part}", (wide,), "plain")
    yield Tensor("ngram.conv", (wide, table.conv_width), "f32")


def dense_tensors(spec: ModelSpec) -> Iterator[tuple[int | None, Tensor]]:
    """Every tensor that is not in the experts' records, in the order of a bundle, with its layer (None: the
    model's own).
    """
    before, after = top_tensors(spec)
    yield from ((None, tensor) for tensor in before)
    known: dict[Layer, tuple[Tensor, ...]] = {}
    for i, layer in enumerate(spec.layers):
        if layer not in known:
            known[layer] = tuple(tensor for tensor in layer_tensors(spec, layer) if tensor.is_dense)
        yield from ((i, tensor) for tensor in known[layer])
    yield from ((None, tensor) for tensor in after)


def dense_tensors_of(spec: ModelSpec, layer: int | None) -> tuple[Tensor, ...]:
    """The same of one layer, or the model's own."""
    if layer is None:
        return tuple(tensor for side in top_tensors(spec) for tensor in side)
    return tuple(tensor for tensor in layer_tensors(spec, spec.layers[layer]) if tensor.is_dense)


# ---- what follows ------------------------------------------------------------------------------------------


def blobs(spec: ModelSpec) -> Iterator[Blob]:
    """Every dense blob of a bundle, in its order. Experts and n-gram tables are stored apart."""
    for layer, tensor in dense_tensors(spec):
        yield from blobs_of(tensor, layer)


def blob_name(tensor: Tensor, layer: int | None) -> str:
    """The name of a dense tensor's blob. layer: None for the model's own."""
    return tensor.name if layer is None else f"layers.{layer}.{tensor.name}"


def blobs_of(tensor: Tensor, layer: int | None) -> Iterator[Blob]:
    """The blobs of a dense tensor: itself, or codes and scales (of rows filled up to whole strips)."""
    name = blob_name(tensor, layer)
    if tensor.store == "int8_rows":
        n, k = align_up(tensor.shape[0], ROW_TILE), align_up(tensor.shape[1], _ROW_BYTES)
        shape = (n // ROW_TILE, k // _ROW_BYTES, ROW_TILE, _ROW_BYTES)
        yield Blob(name, "I8", shape, "int8_rows")
        yield Blob(f"{name}.scale", "F32", (n,), "plain")
    else:
        dtypes = {"f32": "F32", "ids": "I32"}
        yield Blob(name, dtypes.get(tensor.store), tensor.shape, "plain")


def table_tensors(spec: ModelSpec) -> Iterator[tuple[int, Tensor]]:
    """The hashed tables with their layers: blobs of a tier of their own."""
    for i, layer in enumerate(spec.layers):
        if layer.ngram:
            yield from ((i, tensor) for tensor in _ngram_tensors(spec) if tensor.store == "table")


def count_parameters(spec: ModelSpec) -> Parameters:
    """The model's weights without those of a layer that drafts. Of the embedding and of hashed tables a token
    looks up single rows: they count as active by those alone. Raises FormatError for absurd numbers.
    """
    spec = spec.main
    before, after = top_tensors(spec)
    totals, actives = [], []
    for tensor in (*before, *after):
        if tensor.name == "lm_head" and spec.tied:
            actives.append(_elements(tensor))
            continue
        totals.append(_elements(tensor))
        actives.append(spec.hidden if tensor.name == "embedding" else totals[-1])
    counted: dict[Layer, Parameters] = {}
    for layer in spec.layers:
        if layer not in counted:
            counted[layer] = _count_layer(spec, layer)
        totals.append(counted[layer].total)
        actives.append(counted[layer].active)
    return Parameters(checked_add(totals, spec.family), checked_add(actives, spec.family))


def _count_layer(spec: ModelSpec, layer: Layer) -> Parameters:
    experts = layer.mlp.experts if isinstance(layer.mlp, MlpBesideExperts) else layer.mlp
    total = active = 0
    for tensor in layer_tensors(spec, layer):
        elements = 0 if tensor.store == "ids" else _elements(tensor)
        total += elements
        if (tensor.store == "experts" or tensor.per_expert) and isinstance(experts, Experts):
            active += elements // experts.count * experts.router.top_k
        elif tensor.store == "table":
            active += spec.ngram.dim if spec.ngram is not None else 0
        else:
            active += elements
    return Parameters(total, active)


def _elements(tensor: Tensor) -> int:
    return checked_mul(tensor.shape, tensor.name)
