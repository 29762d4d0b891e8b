"""All layouts by the ids of bundles, and the expert formats by the names users give."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from krasis.formats.errors import FormatError
from krasis.formats.layouts.cpu_tiles import CpuTileLayout
from krasis.formats.layouts.expert_format import ExpertFormat, ExpertTier, Layout
from krasis.formats.layouts.int8_rows import Int8RowsLayout
from krasis.formats.layouts.marlin import MarlinLayout
from krasis.formats.layouts.marlin_mxfp4 import MarlinMxfp4Layout

PLAIN = "plain"

# Each gives its format of a layout id, or None for an id of another's.
_EXPERT_FORMATS: tuple[Callable[[str], ExpertFormat | None], ...] = (
    MarlinLayout.from_id,
    MarlinMxfp4Layout.from_id,
    CpuTileLayout.from_id,
)

CPU_FORMATS: Mapping[str, ExpertFormat] = {
    "q8": CpuTileLayout("q8"),
    "int4": CpuTileLayout("i4"),
    "mxfp4": CpuTileLayout("mxfp4"),
}
# Called with bits, group (None: one scale a channel) and the dtype of scales.
GPU_FORMATS: Mapping[str, Callable[[int, int | None, str], ExpertFormat]] = {
    "marlin": MarlinLayout,
    "mxfp4": lambda bits, group, scale_dtype: MarlinMxfp4Layout(),
}


def find_expert_format(layout_id: str) -> ExpertFormat | None:
    """The expert format of a layout id; None for any other id."""
    for from_id in _EXPERT_FORMATS:
        if (found := from_id(layout_id)) is not None:
            return found
    return None


def expert_format(layout_id: str, tier: ExpertTier | None = None, where: str = "") -> ExpertFormat:
    """The expert format of a layout id, which experts of that tier (None: of any) may have.

    Raises FormatError for any other id.
    """
    found = find_expert_format(layout_id)
    if found is None:
        layout_from_id(layout_id)
    if found is None or tier not in (None, found.tier):
        what = "not a layout of experts" if tier is None else f"unexpected layout of the {tier} experts"
        raise FormatError(what, where=where, got=layout_id)
    return found


def layout_from_id(layout_id: str) -> Layout | None:
    """The layout of a bundle's layout id; None for ``plain`` (an ordinary row-major tensor).

    Raises FormatError for an id this version does not know.
    """
    if layout_id == PLAIN:
        return None
    if layout_id == Int8RowsLayout().layout_id:
        return Int8RowsLayout()
    found = find_expert_format(layout_id)
    if found is None:
        raise FormatError(
            "unknown layout", got=repr(layout_id)[:80], hint="the bundle may need a newer version of Krasis"
        )
    return found
