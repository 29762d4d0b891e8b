"""``ModelSpec``: a model as layers of blocks, which converter, planner and backends read; nothing else says
what a model is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from krasis.formats.errors import FormatError
from krasis.formats.models.mixers import Attention, CompressedAttention, LatentAttention
from krasis.formats.models.mlps import Experts, GatedMlp, MlpBesideExperts
from krasis.formats.models.record import (
    MAX_HIDDEN,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    Record,
    fail,
    number,
    read_record,
    required,
    size,
)
from krasis.formats.models.recurrent import ChannelDelta, GatedDelta, Mamba2, ShortConv
from krasis.formats.models.rope import Rope, RopeScaling
from krasis.formats.names import shown

_FAMILY = re.compile(r"[a-z][a-z0-9_]{0,63}")

Mixer = Attention | LatentAttention | CompressedAttention | GatedDelta | ChannelDelta | Mamba2 | ShortConv
Mlp = GatedMlp | Experts | MlpBesideExperts


@dataclass(frozen=True, slots=True)
class Norm(Record):
    """The kind of a model's norms. offset: added to each stored weight (1 where weights are kept about 0)."""

    eps: float = number(0.0, 1.0)
    offset: float = number(0.0, 1.0, 0.0)
    kind: Literal["rms", "layer"] = "rms"


@dataclass(frozen=True, slots=True)
class Residual(Record):
    """How blocks read from and add to the residual.

    ``gated``: streams mixed by low-rank gates of width ``rank``, without norms of the layers. ``hyper``:
    streams mixed by small matrices that Sinkhorn's iteration makes doubly stochastic. end: how the streams
    become one before the last norm (``mixer``: as before a block, in place of that norm).
    """

    kind: Literal["gated", "hyper"]
    streams: int = size(64)
    end: Literal["mean", "head", "mixer"] = required()
    rank: int = size(MAX_HIDDEN, 0, 0)
    rounds: int = size(1000, 0, 0)
    eps: float = number(0.0, 1.0, 1e-6)

    def check(self) -> None:
        if self.kind == "gated" and self.rank < 1:
            raise fail("size is out of range", self, "rank", self.rank, ">= 1")


@dataclass(frozen=True, slots=True)
class NgramTable(Record):
    """Rows of a hashed table that some layers add, chosen by the last ``longest`` token ids.

    heads: hashes of each n-gram size from 2 on. rows: of one layer's table; each has dim / (heads * sizes)
    channels. base: the first candidate for the prime moduli. conv_width, dilation: of the convolution.
    boundary: the token id that stands for those before the sequence, and that n-grams do not reach beyond.
    """

    longest: int = size(16, 2)
    heads: int = size(1 << 12)
    dim: int = size(MAX_HIDDEN)
    rows: int = size(1 << 40)
    base: int = size(1 << 40)
    seed: int = size((1 << 63) - 1, 0)
    conv_width: int = size(64)
    dilation: int = size(64)
    boundary: int = size(MAX_VOCAB, 0)

    @property
    def row_dim(self) -> int:
        """Channels of a row."""
        return self.dim // (self.heads * (self.longest - 1))

    @property
    def past_rows(self) -> int:
        """Earlier positions that the convolution reaches."""
        return (self.conv_width - 1) * self.dilation

    def check(self) -> None:
        if self.dim % (self.heads * (self.longest - 1)):
            parts = self.heads * (self.longest - 1)
            raise fail("rows do not make up the embedding", self, "dim", self.dim, f"a multiple of {parts}")


@dataclass(frozen=True, slots=True)
class Layer(Record):
    """One mixer and one MLP (one of them may be missing), each added to the residual.

    post_norms: their outputs are normed too. parallel: both read one norm of the residual. ngram: rows of the
    model's table are added first. output_scale: the residual is multiplied by one stored number at the end.
    drafts: it is no part of the model, but guesses the token after the next from the model's last hidden
    state and the next token (multi-token prediction), with the model's embedding and head.
    """

    KIND: ClassVar[str] = "layer"
    mixer: Mixer | None
    mlp: Mlp | None
    post_norms: bool = False
    parallel: bool = False
    ngram: bool = False
    output_scale: bool = False
    drafts: bool = False

    def check(self) -> None:
        if self.mixer is None and self.mlp is None:
            raise fail("the layer is empty", self, "mixer", "none", "a mixer or an MLP")

    @property
    def experts(self) -> Experts | None:
        """The layer's routed experts, if it has any."""
        if isinstance(self.mlp, MlpBesideExperts):
            return self.mlp.experts
        return self.mlp if isinstance(self.mlp, Experts) else None


@dataclass(frozen=True, slots=True)
class ModelSpec(Record):
    """A language model. Sizes in elements.

    layers: of which the last one may draft. draft_layers: how many layers the source says that it has for
    drafting (multi-token prediction), whether one of them was taken or not. embedding_scale,
    residual_scale, logits_scale: factors on the embedding, on what blocks add and on the logits. logits_cap:
    cap * tanh(logits / cap).
    """

    family: str
    hidden: int = size(MAX_HIDDEN)
    vocab: int = size(MAX_VOCAB)
    max_positions: int = size(MAX_POSITIONS)
    norm: Norm = required()
    layers: tuple[Layer, ...] = required()
    tied: bool = False
    embedding_scale: float = number(1e-6, 1e6, 1.0)
    residual_scale: float = number(1e-6, 1e6, 1.0)
    logits_scale: float = number(1e-6, 1e6, 1.0)
    logits_cap: float | None = number(1e-3, 1e9, None)
    residual: Residual | None = None
    ngram: NgramTable | None = None
    draft_layers: int = size(64, 0, 0)

    def check(self) -> None:
        if not _FAMILY.fullmatch(self.family):
            raise fail("not the name of a family", self, "family", shown(self.family), "like qwen3_moe")
        if not self.layers:
            raise fail("size is out of range", self, "layers", 0, f"1..{MAX_LAYERS}")
        if self.ngram is None and any(layer.ngram for layer in self.layers):
            raise fail("layers use a table that is not described", self, "ngram", "none", "a table")
        if any(layer.drafts for layer in self.layers[:-1]) or self.layers[0].drafts:
            raise fail("only a last layer behind others can draft", self, "layers", "another", "the last")
        if self.ngram is not None and self.ngram.boundary >= self.vocab:
            raise fail("size is out of range", self, "ngram.boundary", self.ngram.boundary, f"< {self.vocab}")

    @property
    def main(self) -> ModelSpec:
        """The model without the layer that drafts, if it has one."""
        return replace(self, layers=self.layers[:-1]) if self.layers[-1].drafts else self

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers that have routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.experts is not None)

    def experts_of(self, layer: int) -> Experts:
        """A layer's routed experts. Raises FormatError for a layer without."""
        experts = self.layers[layer].experts
        if experts is None:
            raise FormatError("the layer has no experts", where=self.family, got=layer)
        return experts

    @property
    def residual_width(self) -> int:
        """Channels of the residual: ``hidden`` in each stream."""
        return self.hidden * (1 if self.residual is None else self.residual.streams)

    @property
    def rope_scaling(self) -> RopeScaling:
        """The long-context scaling of the first layer that has one; ``none`` for a model without."""
        for layer in dict.fromkeys(self.layers):
            rope: Rope | None = getattr(layer.mixer, "rope", None)
            if rope is not None and rope.scaling.kind != "none":
                return rope.scaling
        return RopeScaling()

    @property
    def max_context(self) -> int:
        """Tokens of context that the model can be asked for: its positions, stretched by its rope scaling.

        Model cards tell users to add a scaling and to leave ``max_positions`` as it is; YaRN then reaches its
        factor times the original positions, linear scaling its factor times ``max_positions``.
        """
        longest = self.max_positions
        for layer in dict.fromkeys(self.layers):
            rope = getattr(layer.mixer, "rope", None)
            if rope is not None:
                scaling = rope.scaling
                reach = {"yarn": scaling.original_max_positions, "linear": self.max_positions}.get(
                    scaling.kind, 0
                )
                longest = max(longest, int(reach * scaling.factor))
        return min(longest, self.block_context or longest, MAX_POSITIONS)

    @property
    def densest_context(self) -> int | None:
        """Tokens up to which an index over tokens or pools picks all of them, so that attention needs none;
        None for models without, and for those that compress: their attention always chooses.
        """
        mixers = (layer.mixer for layer in dict.fromkeys(self.layers))
        selections = [
            getattr(one, "selection", None) for one in mixers if not isinstance(one, CompressedAttention)
        ]
        most = [one.most_keys for one in selections if one is not None and one.kind in ("tokens", "pools")]
        return min(most, default=None)

    @property
    def block_context(self) -> int | None:
        """Tokens up to which an index over means of blocks picks every block; None for models without.
        Contexts end there, until there are kernels for that index.
        """
        selections = [getattr(layer.mixer, "selection", None) for layer in dict.fromkeys(self.layers)]
        budgets = [one.budget for one in selections if one is not None and one.kind == "block_mean"]
        return min(budgets, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: the distinct layers, and by ``pattern`` which of them each layer is."""
        distinct = list(dict.fromkeys(self.layers))
        number_of = {layer: index for index, layer in enumerate(distinct)}
        record = Record.to_json(self)
        record["layers"] = [layer.to_json() for layer in distinct]
        record["pattern"] = [number_of[layer] for layer in self.layers]
        return record

    @classmethod
    def from_json(cls, record: object, where: str = "model") -> ModelSpec:
        """Reads ``to_json``'s form. Unknown, missing or ill-typed fields and impossible sizes raise
        FormatError.
        """
        if not isinstance(record, Mapping):
            raise FormatError("field must be an object", where=where, got=shown(record))
        distinct, pattern = (_list(record, name, where) for name in ("layers", "pattern"))
        layers = [Layer.from_json(entry, f"{where}.layers[{i}]") for i, entry in enumerate(distinct)]
        bad = [i for i in pattern if type(i) is not int or not 0 <= i < len(layers)]
        if bad:
            limit = f"0..{len(layers) - 1}"
            raise FormatError("no such layer", where=f"{where}.pattern", got=shown(bad[0]), limit=limit)
        rest = {key: value for key, value in record.items() if key not in ("layers", "pattern")}
        spec: ModelSpec = read_record(cls, rest | {"layers": tuple(layers[i] for i in pattern)}, where)
        return spec


def _list(record: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_LAYERS:
        got = len(value) if isinstance(value, list) else shown(value)
        limit = f"a list of 1..{MAX_LAYERS}"
        raise FormatError("size is out of range", where=f"{where}.{name}", got=got, limit=limit)
    return value
