"""Layouts of packed weights: each module has pack, unpack and the native wrapper of one layout.

>>> layout_from_id("marlin-u4b8-g128-bf16")
MarlinLayout(bits=4, group=128, scale_dtype='BF16')
>>> layout_from_id("plain") is None
True
"""

from __future__ import annotations

from krasis.formats.layouts.cpu_tiles import CpuTileLayout
from krasis.formats.layouts.expert_format import ExpertFormat, Layout
from krasis.formats.layouts.expert_record import ExpertImportance, ExpertRecord, Section
from krasis.formats.layouts.int8_rows import STRIP_ROWS, Int8RowsLayout, padded_rows
from krasis.formats.layouts.marlin import MarlinLayout
from krasis.formats.layouts.marlin_mxfp4 import MarlinMxfp4Layout
from krasis.formats.layouts.matrix import MatrixView, PackStats, bf16_to_float32, float32_to_bf16
from krasis.formats.layouts.registry import (
    CPU_FORMATS,
    GPU_FORMATS,
    PLAIN,
    expert_format,
    find_expert_format,
    layout_from_id,
)

__all__ = [
    "CPU_FORMATS",
    "GPU_FORMATS",
    "PLAIN",
    "STRIP_ROWS",
    "CpuTileLayout",
    "ExpertFormat",
    "ExpertImportance",
    "ExpertRecord",
    "Int8RowsLayout",
    "Layout",
    "MarlinLayout",
    "MarlinMxfp4Layout",
    "MatrixView",
    "PackStats",
    "Section",
    "bf16_to_float32",
    "expert_format",
    "find_expert_format",
    "float32_to_bf16",
    "layout_from_id",
    "padded_rows",
]
