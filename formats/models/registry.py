"""Finds the family of a checkpoint. A new family is one new file in ``families``; nothing is listed here."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models import families
from krasis.formats.models.family import Family
from krasis.formats.models.gguf import Keys, SizedTensor
from krasis.formats.models.hf import Config
from krasis.formats.models.record import located
from krasis.formats.models.spec import ModelSpec
from krasis.formats.names import shown


@functools.cache
def family_names() -> tuple[str, ...]:
    """The families there are, by the names of their files."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(families.__path__)))


@functools.cache
def _load(name: str) -> Family:
    family: Family = importlib.import_module(f"{families.__name__}.{name}").FAMILY
    return family


def family_of(spec: ModelSpec) -> Family:
    """The family of a model. Raises UnsupportedModelError for one that is not known."""
    if spec.family not in family_names():
        raise UnsupportedModelError("this model family is not known", got=shown(spec.family))
    return _load(spec.family)


def convertible_families() -> tuple[Family, ...]:
    """The families whose checkpoints the converter reads."""
    return tuple(family for family in all_families() if family.names)


def all_families() -> tuple[Family, ...]:
    """Every family."""
    return tuple(_load(name) for name in family_names())


def family_of_model_type(model_type: object) -> Family | None:
    """The family of a ``model_type``; None for an unknown one."""
    if not isinstance(model_type, str):
        return None
    if model_type in family_names() and model_type in _load(model_type).model_types:
        return _load(model_type)  # most: no other file is loaded
    return next((family for family in all_families() if model_type in family.model_types), None)


def spec_from_hf(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The model that a ``config.json`` describes, of any known family. where: the file, for messages.

    Raises UnsupportedModelError for another model type or a setting that is not understood (naming the
    field), FormatError for missing, ill-typed or impossible fields.
    """
    model_type = config.get("model_type")
    family = family_of_model_type(model_type)
    if family is None:
        raise UnsupportedModelError(
            "this model type is not known",
            where=f"{where}: model_type",
            got=shown(model_type),
            limit=", ".join(family_names()),
        )
    outer = Config(config, where)
    _check_classes(outer, family)
    with located(where):
        return family.spec_from_hf(_language_model(outer, family) if model_type in family.nested else outer)


def _check_classes(config: Config, family: Family) -> None:
    classes = config.table.get("architectures")
    if not classes or (isinstance(classes, list) and any(name in classes for name in family.architectures)):
        return
    raise UnsupportedModelError(
        "not a language model with an output head",
        where=config.path("architectures"),
        got=shown(classes),
        limit=", ".join(family.architectures),
    )


def _language_model(outer: Config, family: Family) -> Config:
    """The part of a model of pictures and text that is the language model. What the whole says of the head
    goes before the part. Raises UnsupportedModelError where the part is of another family: some wrappers are
    shared.
    """
    inner = outer.child("text_config")
    inner.expect("model_type", *family.model_types)
    if not outer.has("tie_word_embeddings"):
        return inner
    tied = {"tie_word_embeddings": outer.table["tie_word_embeddings"]}
    return Config({**inner.table, **tied}, inner.where)


def spec_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, SizedTensor], where: str = "GGUF metadata"
) -> ModelSpec:
    """The model that a GGUF's metadata describes. tensors: all of the model's (they tell vocabulary and
    tying).

    Raises UnsupportedModelError for an architecture that is not known or whose GGUFs are not read,
    FormatError for missing, ill-typed or impossible values.
    """
    name = metadata.get("general.architecture")
    readable = {
        gguf: family
        for family in all_families()
        if family.spec_from_gguf is not None
        for gguf in (family.gguf, *family.gguf_aliases)
    }
    names = [str(gguf) for gguf, family in readable.items() if family.names]
    family = readable.get(name) if isinstance(name, str) else None
    if family is None or family.spec_from_gguf is None:
        raise UnsupportedModelError(
            "this model architecture is not supported",
            where=f"{where}: general.architecture",
            got=shown(name),
            limit="supported architectures: " + ", ".join(names),
        )
    with located(where):
        return family.spec_from_gguf(Keys(metadata, str(name), tensors, where))
