"""How long a conversion will take, from packing a few experts of this model on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from krasis.convert.digests import ContentDigests
from krasis.convert.expert_reader import ExpertReader
from krasis.convert.plan import ConversionPlan, expert_record
from krasis.formats.layouts.expert_record import parts_of
from krasis.formats.native import Pool

SAMPLE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Estimate:
    """pack_s: all tiers' packing and reading, without waiting for a disk. gb_per_s: of source."""

    pack_s: float
    gb_per_s: float


def estimate(plan: ConversionPlan) -> Estimate:
    """Packs experts of the first layer that has any for about half a second a tier.

    Dense tensors count as experts of their size.
    """
    spec, settings = plan.spec, plan.settings
    experts = spec.experts_of(spec.expert_layers[0])
    first, counts = spec.expert_layers[0], [spec.experts_of(i).count for i in spec.expert_layers]
    total_s, expert_bytes = 0.0, 0
    with (
        Pool(settings.num_threads) as pool,
        ExpertReader(ContentDigests(), settings.num_threads, plan.memory.decode_slots) as reader,
    ):
        for tier in settings.tiers:
            layout = settings.layout(tier)
            out = np.zeros(expert_record(spec, first, settings, tier).record_bytes, np.uint8)
            source = plan.expert_source(tier)
            begin, times = time.perf_counter(), list[float]()
            for expert in reader.experts(source, first, layout):
                for part, view, piece in zip(
                    parts_of(experts.gated), expert.views, expert.pieces, strict=True
                ):
                    layout.pack_part(
                        pool,
                        part,
                        view,
                        out,
                        hidden=experts.width(spec.hidden),
                        intermediate=experts.intermediate,
                        gated=experts.gated,
                        where=piece.where,
                    )
                times.append(time.perf_counter())
                if times[-1] - times[0] > SAMPLE_SECONDS:
                    break
            # The first expert pays for starting threads and for memory touched for the first time.
            per_expert = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else times[0] - begin
            total_s += per_expert * sum(counts)
            expert_bytes += sum(source.expert_bytes(layer) for layer in spec.expert_layers)
    if total_s <= 0.0 or expert_bytes == 0:
        return Estimate(0.0, 0.0)
    rate = expert_bytes / total_s
    return Estimate(plan.source_bytes / rate, rate / 1e9)
