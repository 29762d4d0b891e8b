"""What is taken of a GPU's memory where a plan was too hopeful: smaller steps, said aloud, until it fits."""

from __future__ import annotations

import logging

import torch

from krasis.formats.errors import OutOfDeviceMemoryError, ResourceError
from krasis.formats.units import format_bytes
from krasis.runtime.device.api import Device
from krasis.runtime.gpu.buffers import Workspace
from krasis.runtime.planning.shape import AnyModel
from krasis.runtime.planning.workspace import activation_bytes

logger = logging.getLogger(__name__)

# torch raises its own where an operator finds no memory for its result.
OUT_OF_MEMORY = (OutOfDeviceMemoryError, torch.OutOfMemoryError)


def largest_workspace(
    device: Device,
    model: AnyModel,
    dtype: torch.dtype,
    num_tokens: int,
    num_ranks: int,
    exact_tokens: int = 0,
) -> Workspace:
    """A workspace of num_tokens tokens, or of half as many, and so on. Raises as ``half_batch``."""
    while True:
        try:
            return Workspace(device, model, dtype, num_tokens, num_ranks, exact_tokens)
        except OUT_OF_MEMORY as error:
            words = str(error)
        num_tokens = half_batch(device, model, num_tokens, num_ranks, words)


def half_batch(device: Device, model: AnyModel, num_tokens: int, num_ranks: int, words: str) -> int:
    """Half of num_tokens, which did not fit: the log says so. Raises ResourceError with the numbers if that
    was one token.

    words: of the error, not the error, whose traceback would keep alive what is to be freed.
    """
    needed = format_bytes(activation_bytes(model, num_tokens, num_ranks))
    if num_tokens == 1:
        raise ResourceError(
            "the GPU's memory does not hold the activations of one token",
            got=f"{needed} for activations, and what operators allocate: {words}",
            limit=f"{format_bytes(device.free_bytes())} are free",
            hint="a shorter --ctx, or close what else uses the GPU",
        )
    half = num_tokens // 2
    logger.warning(
        "out of GPU memory with %s of activations for %d tokens a pass; going on with %d: %s",
        needed,
        num_tokens,
        half,
        words,
    )
    return half
