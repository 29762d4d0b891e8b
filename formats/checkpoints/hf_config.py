"""Reads Hugging Face ``config.json`` (as transformers 4 and 5 write it)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from krasis.formats.architecture_record import Architecture
from krasis.formats.checkpoints.quantised.registry import quantisation_of
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.registry import convertible_families, family_of_model_type, spec_from_hf
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.uniform import architecture_of
from krasis.formats.names import shown


def read_hf_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The model that a ``config.json`` describes, runnable or not. where: the file, for messages.

    Raises UnsupportedModelError for an unknown model type or a setting that is not understood (naming the
    field), FormatError for missing, ill-typed or impossible fields.
    """
    model_type = config.get("model_type")
    if family_of_model_type(model_type) is None:
        known = [model_type for family in convertible_families() for model_type in family.model_types]
        raise UnsupportedModelError(
            "this model type is not supported",
            where=f"{where}: model_type",
            got=shown(model_type),
            limit=f"supported model types: {', '.join(known)}",
        )
    return spec_from_hf(config, where)


def from_hf_config(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Raises what ``read_hf_config`` does, and UnsupportedModelError for a model type or feature that the
    runtime lacks and for weights quantised in a way that is not read.
    """
    spec = read_hf_config(config, where)
    quantisation_of(config, where)
    return architecture_of(spec, where)
