"""What a file of ``families`` says about its model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from krasis.formats.models.gguf import Keys
from krasis.formats.models.hf import Config
from krasis.formats.models.picks import PickOf
from krasis.formats.models.spec import ModelSpec

Transform = Literal[
    "none",
    "add_one",
    "undo_rope_permutation",
    "latent_keys",
    "latent_values",
    "even_columns",
    "odd_columns",
    "log_of_negative",
]
DRAFTING = "layers that only draft (multi-token prediction)"
VISION = "the vision tower"
AUDIO = "the audio tower"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a bundle's tensor comes from: its names on the hub and in a GGUF, the first that is there counts.

    ``{i}`` stands for the layer, ``{e}`` for the expert. A name without ``{e}`` for an expert's matrix holds
    all experts. transform: of the hub's tensor; gguf_transform: of the GGUF's. transposed: the hub's tensor
    of all experts may hold each matrix as [k, n], which its shape tells. pick, gguf_pick: where the tensor
    lies in the hub's, and in the GGUF's, if it is not the whole as it is. interleaved:
    in a tensor of gate and up their rows take turns, gate first.
    """

    hf: tuple[str, ...]
    gguf: tuple[str, ...]
    transform: Transform = "none"
    gguf_transform: Transform = "none"
    transposed: bool = False
    pick: PickOf | None = None
    gguf_pick: PickOf | None = None
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class DraftNames:
    """Of a family whose drafting layer is read. names: sources of its own tensors. root: what stands before
    the hub's names of its layer; None: what stands before those of the layers, of which it is the next.
    """

    names: Mapping[str, Source]
    root: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: how its checkpoints are recognised and read.

    name: of the spec. model_types: in ``config.json``; ``nested`` ones hold the language model in
    ``text_config``. architectures: the classes whose checkpoints are language models. gguf: its architecture
    in GGUF files, which are read where there is a ``spec_from_gguf``; gguf_aliases: its other names there,
    with the same keys and tensors. reference: transformers' class that tests compare with. names: sources by
    bundle tensor or part, empty while the converter does not take the family. left_out: what tensors of the
    hub whose names begin so are of, where the language model computes the same without them. released_in: the
    type of the experts' weights in checkpoints as they were released, where that is not a float: what is made
    of them keeps it. drafts: where its drafting layer is, if that is read.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    reference: str
    spec_from_hf: Callable[[Config], ModelSpec]
    gguf: str | None = None
    gguf_aliases: tuple[str, ...] = ()
    spec_from_gguf: Callable[[Keys], ModelSpec] | None = None
    nested: tuple[str, ...] = ()
    names: Mapping[str, Source] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    released_in: Literal["MXFP4"] | None = None
    drafts: DraftNames | None = None
