"""How much precision was lost: collected while packing, kept in the manifest and as an HDF5 report.

The HDF5 file is for people (h5py, HDFView); the runtime never opens it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from krasis.formats.layouts.matrix import PackStats

REPORT_NAME = "quality.h5"


def stats_to_json(stats: PackStats) -> list[float]:
    """``[squared_error, squared_sum, max_abs_error, count]``; floats survive JSON exactly."""
    return [
        float(stats.squared_error),
        float(stats.squared_sum),
        float(stats.max_abs_error),
        int(stats.count),
    ]


def stats_from_json(values: Iterable[float]) -> PackStats:
    """Inverts ``stats_to_json``."""
    squared_error, squared_sum, max_abs_error, count = values
    return PackStats(float(squared_error), float(squared_sum), float(max_abs_error), int(count))


@dataclass(slots=True)
class UnitQuality:
    """One unit's errors. kinds: totals per tensor kind. experts: per expert, in order (expert units only)."""

    layer: int | None
    kinds: dict[str, PackStats] = field(default_factory=dict)
    experts: dict[str, list[PackStats]] = field(default_factory=dict)

    def add(self, kind: str, stats: PackStats) -> None:
        """Adds to a kind's total."""
        self.kinds[kind] = self.kinds[kind] + stats if kind in self.kinds else stats

    def add_expert(self, kind: str, stats: PackStats) -> None:
        """The next expert's errors, also added to the kind's total."""
        self.add(kind, stats)
        self.experts.setdefault(kind, []).append(stats)

    def to_json(self) -> dict[str, Any]:
        """The record as the journal keeps it."""
        return {
            "layer": self.layer,
            "kinds": {kind: stats_to_json(stats) for kind, stats in self.kinds.items()},
            "experts": {kind: [stats_to_json(s) for s in rows] for kind, rows in self.experts.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> UnitQuality:
        """Inverts ``to_json``."""
        return cls(
            layer=record["layer"],
            kinds={kind: stats_from_json(values) for kind, values in record["kinds"].items()},
            experts={kind: [stats_from_json(v) for v in rows] for kind, rows in record["experts"].items()},
        )


def totals(units: Iterable[UnitQuality]) -> dict[str, PackStats]:
    """Totals per kind, summed in the order of the units (so that a resume gives the same bits)."""
    sums: dict[str, PackStats] = {}
    for unit in units:
        for kind, stats in unit.kinds.items():
            sums[kind] = sums[kind] + stats if kind in sums else stats
    return sums


def manifest_quality(units: Iterable[UnitQuality], samples: Mapping[str, PackStats]) -> dict[str, Any]:
    """``{kind: {relative_mse, max_abs_error, count}}``; ``samples`` are kinds measured elsewhere."""
    return {
        kind: {
            "relative_mse": stats.relative_mse,
            "max_abs_error": float(stats.max_abs_error),
            "count": int(stats.count),
        }
        for kind, stats in sorted({**totals(units), **samples}.items())
    }


def report_bytes(units: list[UnitQuality], num_layers: int) -> bytes:
    """The HDF5 report: a group a kind, with datasets over layers (and experts).

    The same input gives the same bytes.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110"), track_order=False) as file:
        file.attrs["title"] = (
            "Krasis quantisation quality: packed weights against their source, after dequantisation"
        )
        for kind, stats in sorted(totals(units).items()):
            group = file.create_group(kind, track_order=False)
            group.attrs["relative_mse"] = stats.relative_mse
            group.attrs["max_abs_error"] = float(stats.max_abs_error)
            group.attrs["num_weights"] = int(stats.count)
            _write_arrays(group, [unit for unit in units if kind in unit.kinds], kind, num_layers)
    return buffer.getvalue()


def _write_arrays(group: h5py.Group, units: list[UnitQuality], kind: str, num_layers: int) -> None:
    per_layer = [unit for unit in units if unit.layer is not None]
    if not per_layer:
        return
    layers = np.full((num_layers, 2), np.nan)
    for unit in per_layer:
        layers[unit.layer] = unit.kinds[kind].relative_mse, unit.kinds[kind].max_abs_error
    _dataset(group, "layer_relative_mse", layers[:, 0], "layer")
    _dataset(group, "layer_max_abs_error", layers[:, 1], "layer")
    rows = [unit for unit in per_layer if kind in unit.experts]
    if rows:
        num_experts = max(len(unit.experts[kind]) for unit in rows)
        experts = np.full((num_layers, num_experts), np.nan)
        for unit in rows:
            experts[unit.layer] = [stats.relative_mse for stats in unit.experts[kind]]
        _dataset(group, "expert_relative_mse", experts, "layer, expert")


def _dataset(group: h5py.Group, name: str, values: np.ndarray[Any, Any], axes: str) -> None:
    dataset = group.create_dataset(name, data=values, track_times=False)
    dataset.attrs["axes"] = axes
