"""Layouts of packed weights: each module has pack, unpack and the native wrapper of one layout.

>>> layout_from_id("marlin-u4b8-g128-bf16")
MarlinLayout(bits=4, group=128, scale_dtype='BF16')
>>> layout_from_id("plain") is None
True
"""

from __future__ import annotations

import re

from krasis.formats.errors import FormatError
from krasis.formats.layouts.cpu_tiles import CpuTileLayout
from krasis.formats.layouts.expert_record import ExpertImportance, ExpertLayout, ExpertRecord, Section
from krasis.formats.layouts.int8_rows import STRIP_ROWS, Int8RowsLayout, padded_rows
from krasis.formats.layouts.marlin import MarlinLayout
from krasis.formats.layouts.matrix import MatrixView, PackStats, bf16_to_float32, float32_to_bf16

__all__ = [
    "STRIP_ROWS",
    "CpuTileLayout",
    "ExpertImportance",
    "ExpertLayout",
    "ExpertRecord",
    "Int8RowsLayout",
    "MarlinLayout",
    "MatrixView",
    "PackStats",
    "Section",
    "bf16_to_float32",
    "float32_to_bf16",
    "layout_from_id",
    "padded_rows",
]

PLAIN = "plain"

_MARLIN = re.compile(r"marlin-(u4b8|u8b128)-g(32|64|128|channel)-(bf16|f16)")
_TILES = re.compile(r"cpu-(q8|i4)-r32-b32")


def layout_from_id(layout_id: str) -> MarlinLayout | CpuTileLayout | Int8RowsLayout | None:
    """The layout of a bundle's layout id; None for ``plain`` (an ordinary row-major tensor).

    Raises FormatError for an id this version does not know.
    """
    if layout_id == PLAIN:
        return None
    if match := _MARLIN.fullmatch(layout_id):
        code, group, dtype = match.groups()
        return MarlinLayout(
            4 if code == "u4b8" else 8, None if group == "channel" else int(group), dtype.upper()
        )
    if match := _TILES.fullmatch(layout_id):
        return CpuTileLayout(match.group(1))
    if layout_id == Int8RowsLayout().layout_id:
        return Int8RowsLayout()
    raise FormatError(
        "unknown layout", got=repr(layout_id)[:80], hint="the bundle may need a newer version of Krasis"
    )
