"""Whether what a journal says is finished are units of this plan, in every field."""

from __future__ import annotations

import math
from collections.abc import Mapping

from krasis.convert.journal import UnitRecord
from krasis.convert.plan import ConversionPlan, Unit
from krasis.convert.quality import UnitQuality
from krasis.formats.errors import MismatchError


def check_finished(plan: ConversionPlan, finished: Mapping[str, UnitRecord]) -> None:
    """Raises MismatchError for a record that this program would not have written for this plan.

    Each line has a checksum, so that this is no torn write; but what goes into a manifest is looked at all
    the same.
    """
    units = {unit.name: unit for unit in plan.units}
    for name, record in finished.items():
        unit = units.get(name)
        if unit is None or set(record.blobs) != set(unit.blobs) or not _is_quality(plan, unit, record):
            raise MismatchError(
                "the journal of the unfinished conversion holds a step that is not of this conversion",
                got=ascii(name[:80]),
                hint="--restart discards what was done and begins anew",
            )


def _num_experts(plan: ConversionPlan, unit: Unit) -> int:
    return 0 if unit.layer is None else plan.spec.experts_of(unit.layer).count


def _is_quality(plan: ConversionPlan, unit: Unit, record: UnitRecord) -> bool:
    try:
        quality = UnitQuality.from_json(record.quality)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return False
    rows = [*quality.kinds.values(), *(stats for experts in quality.experts.values() for stats in experts)]
    return (
        quality.layer == unit.layer
        and set(quality.experts) == (set() if unit.kind in ("dense", "table") else set(quality.kinds))
        and all(len(experts) == _num_experts(plan, unit) for experts in quality.experts.values())
        and all(math.isfinite(one.squared_error + one.squared_sum + one.max_abs_error) for one in rows)
        and quality.to_json() == record.quality
    )
