"""Token ids as callers give them: whole numbers below the vocabulary's size, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import UsageError

TokenIds = npt.NDArray[np.int64]
_MAX_SHOWN = 40


def checked_ids(tokens: Sequence[int] | npt.NDArray[np.integer[Any]], vocab_size: int) -> TokenIds:
    """The ids as int64 [n], n may be 0. Raises UsageError for what is no list of whole numbers, and for the
    first id outside 0..vocab_size-1.
    """
    if isinstance(tokens, (str, bytes, bytearray, memoryview)):
        raise UsageError(
            "token ids are whole numbers in a list",
            got=type(tokens).__name__,
            hint="Engine.encode makes ids of text",
        )
    if hasattr(tokens, "__array__"):  # NumPy's own, torch's tensors
        return _in_vocabulary(_checked_array(np.asarray(tokens)), vocab_size)
    try:
        items: list[Any] = list(tokens)
    except TypeError as error:
        raise UsageError("token ids are whole numbers in a list", got=type(tokens).__name__) from error
    for item in items:
        # bool is an int to Python, and no token to anybody.
        if type(item) is not int and not isinstance(item, np.integer):
            raise UsageError("a token id is no whole number", got=_shown(item))
        if not 0 <= item < vocab_size:
            raise UsageError("a token id is outside the vocabulary", got=_shown(item), limit=vocab_size)
    return np.array(items, dtype=np.int64)


def _checked_array(array: npt.NDArray[Any]) -> npt.NDArray[np.integer[Any]]:
    if array.ndim != 1:
        raise UsageError("token ids are whole numbers in a list", got=f"an array of shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise UsageError("a token id is no whole number", got=f"{_shown(array[0].item())} of {array.dtype}")
    return array


def _in_vocabulary(array: npt.NDArray[np.integer[Any]], vocab_size: int) -> TokenIds:
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        got = int(array[outside.argmax()])
        raise UsageError("a token id is outside the vocabulary", got=_shown(got), limit=vocab_size)
    return array.astype(np.int64)


def _shown(item: object) -> str:
    """A value and, unless it is a plain int, its type; never long."""
    try:
        text = repr(item)
    except ValueError:  # Python refuses to write out an int of more than 4300 digits
        return f"an {type(item).__name__} of thousands of digits"
    text = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
    return text if type(item) is int else f"{type(item).__name__} {text}"
