"""Which 4-bit experts a source has, by its headers: formats that keep these are chosen by themselves."""

from __future__ import annotations

from krasis.convert.sources import TensorInfo, WeightSource
from krasis.formats.checkpoints.quantised.kept import KeptCodes

_MXFP4 = ("MXFP4", "mxfp4")
_Q4_0_GROUP = 32


def kept_codes(source: WeightSource) -> KeptCodes:
    """Of a source's experts."""
    if all(info.dtype in _MXFP4 for info in source.expert_infos):
        return KeptCodes(mxfp4=True)
    groups = {_symmetric_group(info) for info in source.expert_infos}
    return KeptCodes(group=groups.pop() if len(groups) == 1 else None)


def _symmetric_group(info: TensorInfo) -> int | None:
    if info.quantised is not None:
        return info.quantised.symmetric_group
    return _Q4_0_GROUP if info.dtype == "Q4_0" else None
