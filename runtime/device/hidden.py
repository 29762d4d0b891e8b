"""Hides from an operation on the double all device memory that it did not name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from krasis.runtime.device.double_memory import Allocation
from krasis.runtime.device.double_schedule import Touched
from krasis.runtime.device.ordering import OrderingError

_HIDDEN = 0xFF  # NaN in every float type, -1 in every integer: most uses of it show


@contextmanager
def hidden(memory: Sequence[Allocation], touched: Sequence[Touched], label: str) -> Iterator[None]:
    """Inside, device memory outside of touched is poison. Raises OrderingError if it changes.

    Host memory is left alone: other threads may be using it.
    """
    saved: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.bool_], str]] = []
    for allocation in memory:
        if not allocation.is_device:
            continue
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * allocation.num_bytes).from_address(allocation.address))
        is_hidden = np.ones(allocation.num_bytes, np.bool_)
        for other, ranges in touched:
            if other is allocation:
                for begin, end in ranges:
                    is_hidden[begin:end] = False
        saved.append((raw, raw[is_hidden], is_hidden, allocation.label))
        raw[is_hidden] = _HIDDEN
    try:
        yield
    finally:
        changed = []
        for raw, before, is_hidden, name in saved:
            if (raw[is_hidden] != _HIDDEN).any():
                changed.append(name)
            raw[is_hidden] = before
    if changed:
        raise OrderingError(f"{label} wrote memory that it did not name", where=", ".join(changed))
