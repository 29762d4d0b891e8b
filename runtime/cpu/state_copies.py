"""Copies of what each token overwrites, made between the rows of a pass that may have gone too far."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from krasis.runtime.cpu.delta_kernels import DeltaPlace
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native_arrays import Array
from krasis.runtime.cpu.spans import Round

if TYPE_CHECKING:
    from krasis.runtime.cpu.blocks import Rows


def parts_of(rows: Rows) -> tuple[Round, ...]:
    """The rows of a pass, one by one of each sequence where states are copied in between."""
    if rows.trail is None or rows.rounds is None:
        return (Round(0, rows.num, rows.spans),)
    return rows.rounds.of(1)


def copy_states(kernels: Kernels, rows: Rows, part: Round, place: DeltaPlace, fixed_begin: int) -> None:
    """Copies a layer's state behind the rows of a part, where that is wanted. fixed_begin: where the fixed
    bytes begin from which the place counts."""
    if rows.trail is None:
        return
    begin, end = place.matrices_offset_bytes - fixed_begin, place.end_bytes - fixed_begin
    step = functools.partial(_copy, rows.trail, range(part.begin, part.end), slice(begin, end))
    kernels.step("copy of a state", step)


def _copy(trail: Mapping[int, tuple[Array, Array]], rows: range, where: slice) -> None:
    for row in rows:
        if row in trail:
            fixed, copy = trail[row]
            copy[where] = fixed[where]
