"""Reads the metadata of a GGUF file into our architecture record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from krasis.formats.architecture_record import Architecture
from krasis.formats.models.gguf import SizedTensor
from krasis.formats.models.registry import spec_from_gguf
from krasis.formats.models.uniform import architecture_of


def from_gguf_metadata(
    metadata: Mapping[str, Any], tensors: Mapping[str, SizedTensor], where: str = "GGUF metadata"
) -> Architecture:
    """The architecture that a GGUF's metadata describes. tensors: all of the model's (they tell vocabulary
    and tying).

    Raises UnsupportedModelError for another architecture or a feature the runtime lacks, FormatError for
    missing, ill-typed or impossible values.
    """
    return architecture_of(spec_from_gguf(metadata, tensors, where), where)
