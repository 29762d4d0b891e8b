"""Takes a source's layer that drafts into the model, when that is asked for.

It costs as much as one more layer, on the disk and while converting: 1/60 of DeepSeek's bytes, 1/48 of
Qwen3-Next's. Whether it pays depends on where the bundle will run, so nobody gets it without asking.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from krasis.convert.source_names import SourceNames
from krasis.formats.errors import UnsupportedModelError, UsageError
from krasis.formats.models.drafting import with_draft
from krasis.formats.models.family import Family
from krasis.formats.models.registry import all_families
from krasis.formats.models.spec import ModelSpec

_WITHOUT = "leave --mtp out"


def drafting_spec(
    kind: Literal["hf", "gguf"], path: Path, spec: ModelSpec, family: Family, present: Mapping[str, object]
) -> ModelSpec:
    """The model with its drafting layer. present: the source's tensors by name.

    Raises UnsupportedModelError for a family whose layer is not read, UsageError for a source without one.
    """
    if family.drafts is None:
        known = ", ".join(sorted(one.name for one in all_families() if one.drafts is not None))
        raise UnsupportedModelError(
            "--mtp: the drafting layer of this family is not read",
            where=str(path),
            got=spec.family,
            limit=known,
            hint=_WITHOUT,
        )
    drafting = with_draft(spec)
    projection = ""
    if drafting is not None:
        names = SourceNames(kind, family, drafting, present)
        projection = names.tensor("draft.projection", len(spec.layers))
    if drafting is None or projection not in present:
        raise UsageError(
            "--mtp: this source has no layer that drafts",
            where=str(path),
            got=f"no '{projection}'" if projection else "no attention to all tokens",
            hint=_WITHOUT + (": GGUF files often come without it" if kind == "gguf" else ""),
        )
    return drafting
