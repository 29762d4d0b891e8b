"""What a stream's copy may be, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from krasis.formats.errors import UsageError


def check_copy(
    destination: torch.Tensor, source: torch.Tensor, on_device: Sequence[bool], stream: str
) -> None:
    """Raises UsageError unless a stream can copy without blocking. on_device: of destination and source.

    Between host and device both must be contiguous: torch would copy through a pageable temporary, and wait.
    """
    where = f"copy on stream {stream}"
    if destination.shape != source.shape or destination.dtype != source.dtype:
        raise UsageError(
            "a copy needs equal shapes and types",
            where=where,
            got=f"{source.dtype} {list(source.shape)}",
            limit=f"{destination.dtype} {list(destination.shape)}",
        )
    if not any(on_device):
        raise UsageError("a stream does not copy from host to host", where=where)
    if not all(on_device) and not (destination.is_contiguous() and source.is_contiguous()):
        raise UsageError(
            "a copy between host and device needs contiguous tensors",
            where=where,
            got=f"strides {source.stride()} to {destination.stride()} of {list(source.shape)}",
        )
