"""Which types of tensors the converter reads."""

from __future__ import annotations

from krasis.convert.slices import FLOAT_BYTES
from krasis.formats.checkpoints.foreign_ggml_types import INSTEAD
from krasis.formats.checkpoints.ggml_blocks import SUPPORTED_TYPES
from krasis.formats.checkpoints.quantised_checkpoint import type_hint
from krasis.formats.errors import FormatError


def check_type(dtype: str, where: str, *, is_hf: bool, is_vector: bool) -> None:
    """Raises FormatError, with the way out, for a type of a tensor that is not read."""
    if is_hf and dtype not in FLOAT_BYTES:
        raise FormatError(
            "unsupported weight type",
            where=where,
            got=dtype,
            limit=", ".join(FLOAT_BYTES),
            hint=type_hint(dtype),
        )
    if not is_hf and dtype not in SUPPORTED_TYPES:
        raise FormatError(
            f"tensors of type {dtype} hold no weights, or nothing here decodes them",
            where=where,
            limit=", ".join(SUPPORTED_TYPES),
            hint=f"take {INSTEAD}",
        )
    if is_vector and dtype not in FLOAT_BYTES:
        raise FormatError(
            "a vector must not be quantised", where=where, got=dtype, limit=", ".join(FLOAT_BYTES)
        )
