"""Under which names a checkpoint holds a model's tensors: its family's names, and what is there of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.layouts.expert_record import Part
from krasis.formats.models.drafting import COPIES
from krasis.formats.models.family import DRAFTING, Family, Source
from krasis.formats.models.spec import ModelSpec

# Buffers that some exporters keep beside the weights; the runtime derives them from the config.
_NEEDLESS_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "rotary_emb.original_inv_freq",
    "rope_freqs.weight",
    "_extra_state",
)


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """Where a matrix of one expert lies. first_matrix: those of its size before it in the tensor. holds_all:
    the tensor is that of all experts, with so many matrices of each (gate and up may be in one). interleaved:
    whose rows take turns.
    """

    tensor: str
    first_matrix: int = 0
    holds_all: bool = False
    matrices: int = 1
    interleaved: bool = False

    def taken(self, rows: int) -> slice:
        """Its rows among those of its expert's matrices in the tensor, of so many rows each."""
        number = self.first_matrix % self.matrices
        return (
            slice(number, None, self.matrices)
            if self.interleaved
            else slice(number * rows, (number + 1) * rows)
        )


class SourceNames:
    """The names of one checkpoint's tensors. present: the tensors that it has, by name."""

    def __init__(
        self, kind: Literal["hf", "gguf"], family: Family, spec: ModelSpec, present: Mapping[str, object]
    ) -> None:
        self._kind, self._family, self._spec, self._present = kind, family, spec, present
        self._drafting = self._drafting_prefixes()

    def source(self, ours: str) -> Source:
        """What the family says of a tensor or part. Raises UnsupportedModelError if it says nothing."""
        source = self._family.names.get(ours)
        if source is None and self._family.drafts is not None:
            source = self._family.drafts.names.get(ours)
        if source is None:
            raise UnsupportedModelError(
                "the converter does not know the name of this tensor yet", where=self._family.name, got=ours
            )
        return source

    def _templates(self, ours: str, layer: int | None = None) -> tuple[str, ...]:
        source = self.source(ours)
        if self._kind == "gguf":
            return source.gguf
        drafts = self._family.drafts
        if layer is None or drafts is None or drafts.root is None or not self._spec.layers[layer].drafts:
            return source.hf
        rooted = {name: name.partition("layers.{i}.")[2] for name in source.hf}
        return tuple(dict.fromkeys(drafts.root + rest if rest else name for name, rest in rooted.items()))

    def tensor(self, ours: str, layer: int | None) -> str:
        """The first of its names that is there, else the usual one."""
        templates = self._templates(ours, layer)
        if self._spec.tied and ours in ("lm_head", "embedding"):
            # A tied checkpoint may hold the one matrix under either name.
            templates = (*self._templates("embedding"), *self._templates("lm_head"))
        names = [template if layer is None else template.format(i=layer) for template in templates]
        return next((name for name in names if name in self._present), names[0])

    def all_of(self, ours: str, layer: int) -> tuple[str, ...]:
        """All names that a tensor of a layer may have."""
        return tuple(template.format(i=layer) for template in self._templates(ours))

    def expert(self, layer: int, expert: int, part: Part) -> ExpertPlace:
        """Where a matrix lies: in a tensor of all experts, in one with gate and up, or in its own."""
        templates = self._templates(f"experts.{part}", layer)
        for template in templates:
            if "{e}" not in template and (name := template.format(i=layer)) in self._present:
                return ExpertPlace(name, expert, holds_all=True)
        if part != "down" and "experts.gate_up" in self._family.names:
            for template in self._templates("experts.gate_up", layer):
                if (name := template.format(i=layer)) in self._present:
                    turns = self._kind == "hf" and self.source("experts.gate_up").interleaved
                    number = 2 * expert + (part == "up")
                    return ExpertPlace(name, number, holds_all=True, matrices=2, interleaved=turns)
        names = [template.format(i=layer, e=expert) for template in templates if "{e}" in template]
        return ExpertPlace(next((name for name in names if name in self._present), names[0]))

    @property
    def may_be_transposed(self) -> bool:
        """Whether tensors of all experts may hold each matrix as [k, n]."""
        return self._kind == "hf" and self.source("experts.down").transposed

    def is_needless(self, name: str) -> bool:
        """Whether a tensor says nothing that the configuration does not say, or is a tied head's copy."""
        tied_head = (*self._templates("lm_head"), *self._templates("embedding")) if self._spec.tied else ()
        return name.endswith(_NEEDLESS_SUFFIXES) or name in tied_head or self._is_draft_copy(name)

    def _is_draft_copy(self, name: str) -> bool:
        """Whether a tensor is the model's embedding or head once more, beside the layer that drafts."""
        count = len(self._spec.layers)
        return self._spec.layers[-1].drafts and name in {
            f"{root}{end}" for root in (f"{self._layer_root()}{count - 1}.", "mtp.") for end in COPIES
        }

    def left_out(self, name: str) -> str | None:
        """What a tensor is of that the language model does without, None for others."""
        if name.startswith(self._drafting):
            return DRAFTING
        if self._kind == "gguf":
            return None
        return next((what for prefix, what in self._family.left_out.items() if name.startswith(prefix)), None)

    def _drafting_prefixes(self) -> tuple[str, ...]:
        """Of the layers behind the last one, as many as the model says that it has for drafting."""
        root, end = self._layer_root(), len(self._spec.main.layers) + self._spec.draft_layers
        return tuple(f"{root}{i}." for i in range(len(self._spec.layers), end))

    def _layer_root(self) -> str:
        """What stands before the numbers of layers: of several such, what is there."""
        sources = (source.hf if self._kind == "hf" else source.gguf for source in self._family.names.values())
        roots = dict.fromkeys(
            name.partition("{i}")[0] for names in sources for name in names if "{i}" in name
        )
        there = (root for root in roots if any(name.startswith(root) for name in self._present))
        return next(there, next(iter(roots)))
