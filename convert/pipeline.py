"""Runs the units of a plan: read, pack and write overlap; each finished unit is synced and journalled."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from krasis.convert.alarms import Alarms, PackedPart, tell
from krasis.convert.dense import DensePacker
from krasis.convert.digests import ContentDigests
from krasis.convert.expert_reader import ExpertReader, ExpertWeights
from krasis.convert.importance import Calibration
from krasis.convert.journal import Journal, UnitRecord
from krasis.convert.plan import ConversionPlan, Unit, expert_record
from krasis.convert.progress import Reporter
from krasis.convert.quality import UnitQuality
from krasis.convert.resources import anonymous_bytes
from krasis.convert.resumption import check_finished
from krasis.convert.writer_thread import Bytes, StagingRing, WriterThread
from krasis.formats.bundle.writer import BlobSink, BundleWriter
from krasis.formats.errors import FormatError
from krasis.formats.layouts.expert_record import ExpertImportance, clear_padding, parts_of
from krasis.formats.layouts.matrix import PackStats
from krasis.formats.native import Pool
from krasis.formats.process import stop_signals

if TYPE_CHECKING:
    from krasis.convert.hub.streamed import StreamedSources


@dataclass(slots=True)
class PipelineResult:
    """What the finished units add up to, those of earlier runs included.

    peak_bytes: memory beyond the page cache.
    """

    digests: ContentDigests
    blobs: dict[str, str] = field(default_factory=dict)
    quality: dict[str, UnitQuality] = field(default_factory=dict)
    peak_bytes: int = 0
    source_bytes: int = 0


def run_units(
    plan: ConversionPlan,
    writer: BundleWriter,
    journal: Journal,
    finished: Mapping[str, UnitRecord],
    calibration: Calibration | None,
    reporter: Reporter,
    streamed: StreamedSources | None = None,
) -> PipelineResult:
    """Does what ``finished`` lacks, in the plan's order. Interrupted at any point, the journal stays true.

    streamed: is told what is needed next, and what no more.
    """
    result = PipelineResult(ContentDigests())
    check_finished(plan, finished)
    if streamed is not None:
        streamed.go_on(finished)
    for earlier in finished.values():
        result.digests.restore(earlier.tensors)
    done_bytes = sum(unit.source_bytes for unit in plan.units if unit.name in finished)
    reporter.begin(plan.source_bytes, done_bytes)
    settings = plan.settings
    files = {name: file.name for name, (file, _) in plan.places().items()}
    known = set(result.digests.finished())
    try:
        with (
            Pool(settings.num_threads) as pool,
            WriterThread() as thread,
            ExpertReader(result.digests, settings.num_threads, plan.memory.decode_slots) as reader,
            nullcontext() if streamed is None else streamed.used(),
        ):
            worker = _Worker(plan, writer, pool, thread, reader, calibration, reporter, result)
            for unit in plan.units:
                record = finished.get(unit.name)
                if record is None:
                    if streamed is not None:
                        streamed.begin(unit.name)
                    blobs, quality = worker.pack(unit)
                    tell(worker.alarms, reporter, force=settings.force_weights)
                    for blob in {files[blob]: blob for blob in unit.blobs}.values():
                        writer.sync_blob(blob)  # each shard once
                    tensors = result.digests.take_new(known)
                    known.update(tensors)
                    record = UnitRecord(unit.name, blobs, tensors, quality.to_json())
                    journal.append(record)
                    if streamed is not None:
                        streamed.end(unit.name)
                    result.source_bytes += unit.new_bytes
                result.blobs.update(record.blobs)
                result.quality[unit.name] = UnitQuality.from_json(record.quality)
            for note in worker.alarms.notes():
                reporter.warn(note)
    finally:
        reporter.end()
    return result


class _Worker:
    """What packing a unit needs, made once."""

    def __init__(
        self,
        plan: ConversionPlan,
        writer: BundleWriter,
        pool: Pool,
        thread: WriterThread,
        reader: ExpertReader,
        calibration: Calibration | None,
        reporter: Reporter,
        result: PipelineResult,
    ) -> None:
        self._plan, self._writer, self._pool, self._thread = plan, writer, pool, thread
        self._reader, self._calibration, self._reporter, self._result = reader, calibration, reporter, result
        self.alarms = Alarms()
        self._ring = StagingRing(plan.memory.staging_slots, plan.memory.slot_bytes)
        self._dense = DensePacker(
            pool, plan.dense_source, writer, thread, result.digests, self.alarms, self._advance
        )

    def pack(self, unit: Unit) -> tuple[dict[str, str], UnitQuality]:
        """Writes the unit's blobs. Their digests and errors."""
        if unit.kind == "dense":
            return self._dense.pack(unit)
        if unit.kind == "table":
            return self._dense.pack_table(unit)
        return self._pack_experts(unit)

    def _pack_experts(self, unit: Unit) -> tuple[dict[str, str], UnitQuality]:
        if unit.layer is None:
            raise FormatError("a unit of experts has no layer", where=unit.name)
        plan, tier = self._plan, unit.kind
        source = plan.expert_source(tier)
        record_bytes = expert_record(plan.spec, unit.layer, plan.settings, tier).record_bytes
        layout = plan.settings.layout(tier)
        quality = UnitQuality(unit.layer)
        (name,) = unit.blobs
        with self._writer.open_blob(name) as sink:
            experts = self._reader.experts(source, unit.layer, layout)
            slab, filled = self._ring.take(self._thread), 0
            for number, expert in enumerate(experts):
                if filled + record_bytes > slab.nbytes:
                    self._write(sink, slab, filled)
                    slab, filled = self._ring.take(self._thread), 0
                self._pack_expert(unit, number, expert, slab[filled : filled + record_bytes], quality)
                filled += record_bytes
                self._advance(expert.num_bytes)
                source.release(expert.pieces)
            self._write(sink, slab, filled)
            self._thread.flush()
            self.alarms.end_layer(plan.spec.experts_of(unit.layer).count)
            return {name: sink.close()}, quality

    def _write(self, sink: BlobSink, slab: Bytes, filled: int) -> None:
        self._thread.write(sink, slab[:filled], functools.partial(self._ring.release, slab))

    def _pack_expert(
        self, unit: Unit, number: int, expert: ExpertWeights, out: Bytes, quality: UnitQuality
    ) -> None:
        plan, tier = self._plan, unit.kind
        hidden, intermediate = expert.views[0].k, expert.views[0].n
        gated = plan.spec.experts_of(unit.layer or 0).gated
        layout = plan.settings.layout(tier)
        importance = self._importance(unit, number)
        clear_padding(out, layout.expert_record(hidden, intermediate, gated))
        w13, packed = PackStats(), []
        parts = zip(parts_of(gated), expert.views, expert.pieces, expert.runs, strict=True)
        for part, view, piece, runs in parts:
            stats = layout.pack_part(
                self._pool,
                part,
                view,
                out,
                hidden=hidden,
                intermediate=intermediate,
                gated=gated,
                importance=None if importance is None else importance.of(part),
                where=piece.where,
            )
            limit = layout.explained_error(view.k)
            packed.append(PackedPart(piece, runs, stats, limit, layout.layout_id))
            if part == "down":
                quality.add_expert(f"experts.{tier}.w2", stats)
            else:
                w13 = w13 + stats
        quality.add_expert(f"experts.{tier}.w13", w13)
        self.alarms.look_at_expert(f"layer {unit.layer} expert {number}", packed)

    def _importance(self, unit: Unit, number: int) -> ExpertImportance | None:
        if self._calibration is None or unit.layer is None:
            return None
        return self._calibration.expert(unit.layer, number)

    def _advance(self, num_bytes: int) -> None:
        stop_signals.check()
        self._result.peak_bytes = max(self._result.peak_bytes, anonymous_bytes())
        self._reporter.advance(num_bytes)
