"""Reads back what was written, before the bundle gets its name: a sample, or every checksum."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from krasis.convert.crosscheck import spread
from krasis.convert.plan import ConversionPlan, Unit, expert_record
from krasis.convert.quality import UnitQuality
from krasis.formats.errors import ChecksumError
from krasis.formats.files.file_ops import io_errors
from krasis.formats.files.regular_file import Bytes, open_regular, read_range
from krasis.formats.layouts.expert_record import PARTS, parts_of

NUM_SAMPLED_LAYERS = 2
NUM_SAMPLED_EXPERTS = 2
_READ_BYTES = 16 << 20


def verify_sample(plan: ConversionPlan, folder: Path, quality: Mapping[str, UnitQuality]) -> int:
    """Unpacks a few experts from the shards with NumPy; their error must be what packing measured.

    Returns the number of experts compared. Raises ChecksumError when one differs: the disk or memory is
    faulty.
    """
    spec, places, count = plan.spec, plan.places(), 0
    with_experts = spec.expert_layers
    layers = {with_experts[i] for i in spread(len(with_experts), NUM_SAMPLED_LAYERS)}
    for unit in plan.units:
        if unit.kind in ("dense", "table") or unit.layer is None or unit.layer not in layers:
            continue
        file, blob = places[unit.blobs[0]]
        record_bytes = expert_record(spec, unit.layer, plan.settings, unit.kind).record_bytes
        fd = open_regular(folder / file.name, follow_links=False)
        try:
            for expert in spread(spec.experts_of(unit.layer).count, NUM_SAMPLED_EXPERTS):
                offset = blob.offset_bytes + expert * record_bytes
                record = np.frombuffer(read_range(fd, offset, record_bytes, file.name), np.uint8)
                parts = quality[unit.name].experts
                stats = parts[f"experts.{unit.kind}.w13"][expert] + parts[f"experts.{unit.kind}.w2"][expert]
                _compare(plan, unit, expert, record, stats.relative_mse)
                count += 1
        finally:
            os.close(fd)
    return count


def _compare(plan: ConversionPlan, unit: Unit, expert: int, record: Bytes, measured: float) -> None:
    layer, layout = unit.layer or 0, plan.settings.layout(unit.kind)
    experts = plan.spec.experts_of(layer)
    unpacked = layout.unpack_expert(
        record, experts.width(plan.spec.hidden), experts.intermediate, experts.gated
    )
    source = plan.expert_source(unit.kind)
    error = total = 0.0
    for part, values in zip(PARTS, unpacked, strict=True):
        if part not in parts_of(experts.gated):
            continue
        expected = source.expert(layer, expert, part).decode().astype(np.float64)
        error += float(np.square(expected - values).sum())
        total += float(np.square(expected).sum())
    relative = error / total if total else error
    # float32 products on one side, native sums on the other: equal to a few digits.
    if not math.isclose(relative, measured, rel_tol=1e-2, abs_tol=1e-10):
        raise ChecksumError(
            "an expert read back differs from what was packed",
            where=f"{unit.blobs[0]}, expert {expert}",
            got=f"relative squared error {relative:.3g}",
            limit=f"{measured:.3g} measured while packing",
            hint="the disk or the memory of this machine is faulty, or this is a bug: please report it",
        )


def verify_checksums(plan: ConversionPlan, folder: Path, digests: Mapping[str, str]) -> None:
    """Reads every blob back from the disk and compares its checksum. Raises ChecksumError naming the blob."""
    for file in plan.shards.files:
        fd = open_regular(folder / file.name, follow_links=False)
        try:
            with io_errors("dropping cached pages", file.name):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # else the page cache would be compared
            for blob in file.blobs:
                hasher = xxhash.xxh3_128()
                for start in range(0, blob.spec.num_bytes, _READ_BYTES):
                    size = min(_READ_BYTES, blob.spec.num_bytes - start)
                    hasher.update(read_range(fd, blob.offset_bytes + start, size, file.name))
                if hasher.hexdigest() != digests[blob.spec.name]:
                    raise ChecksumError(
                        "the bytes on disk are not those that were written",
                        where=f"{folder / file.name}: '{blob.spec.name}'",
                        hint="the disk may be faulty; run the command again with --restart",
                    )
        finally:
            os.close(fd)
