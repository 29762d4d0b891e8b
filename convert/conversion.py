"""One conversion from beginning to end: checks, plan, units, verification, and the bundle's name at last."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from krasis.convert.alarms import Alarms, tell
from krasis.convert.crosscheck import CrossCheck, check_once
from krasis.convert.estimate import Estimate, estimate
from krasis.convert.finished import finish_earlier_run, same_bundle
from krasis.convert.holes import look_into_holes
from krasis.convert.importance import Calibration, load_calibration
from krasis.convert.inputs import recognise
from krasis.convert.journal import JOURNAL_NAME
from krasis.convert.notices import notices
from krasis.convert.opening import OpenInputs, open_inputs
from krasis.convert.output_name import check_apart, check_name
from krasis.convert.partial import Partial, is_resumable, open_partial, partial_path
from krasis.convert.pipeline import PipelineResult, run_units
from krasis.convert.plan import ConversionPlan, plan_conversion
from krasis.convert.progress import Reporter
from krasis.convert.quality import REPORT_NAME, manifest_quality, report_bytes
from krasis.convert.resources import (
    allocated_bytes,
    check_disk,
    check_file_size,
    check_memory,
    check_writable,
    free_disk_bytes,
    needed_disk_bytes,
    usable_memory_bytes,
)
from krasis.convert.settings import ConvertSettings
from krasis.convert.text_check import sound_text
from krasis.convert.verify import verify_checksums, verify_sample
from krasis.formats.bundle.manifest import MANIFEST_NAME, AssetRecord, Manifest, SourceRecord, minor_of
from krasis.formats.bundle.publish import check_replaceable
from krasis.formats.errors import UsageError
from krasis.formats.files.file_ops import FileOps
from krasis.formats.process import stop_signals
from krasis.formats.process.tool import tool_version
from krasis.formats.units import format_bytes

if TYPE_CHECKING:
    from krasis.convert.hub.streamed import StreamedSources


@dataclass(frozen=True, slots=True)
class Summary:
    """What a finished conversion reports.

    source_bytes (each tensor once) and elapsed_s: of this run; a resumed one did only the rest. output_io:
    how shards were written, and why, for a person. was_complete: an earlier run had made it, and this one
    wrote nothing.
    """

    out: Path
    tier_bytes: Mapping[str, int]
    total_bytes: int
    source_bytes: int
    elapsed_s: float
    peak_bytes: int
    quality: Mapping[str, Mapping[str, float]]
    resumed_units: int
    output_io: str
    was_complete: bool = False

    @property
    def gb_per_s(self) -> float:
        """Source input by wall time."""
        return self.source_bytes / max(self.elapsed_s, 1e-9) / 1e9


@dataclass(frozen=True, slots=True)
class DryRun:
    """What would be done. output_bytes: on disk, padding and text files aside. source_bytes: that are read,
    each tensor once. needed_disk_bytes: beyond what an unfinished conversion holds already.
    """

    tier_bytes: Mapping[str, int]
    output_bytes: int
    num_files: int
    source_bytes: int
    free_disk_bytes: int
    needed_disk_bytes: int
    memory_bytes: int
    estimate: Estimate
    layouts: Mapping[str, str]
    resumable: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """Inputs opened and checked, nothing written yet."""

    inputs: OpenInputs
    settings: ConvertSettings
    plan: ConversionPlan
    cross_check: CrossCheck | None
    calibration: Calibration | None
    out: Path
    streamed: StreamedSources | None = None


def prepare(
    paths: Sequence[Path],
    out: Path,
    settings: ConvertSettings,
    reporter: Reporter,
    streamed: StreamedSources | None = None,
) -> Prepared:
    """Everything that can be refused without long reading: headers, shapes, output, cross-check, plan.

    streamed: gets what of the sources is not on the disk.
    """
    if not out.name or out.name == "..":
        out = Path(os.path.abspath(out))  # noqa: PTH100 -- resolve would follow links
    recognised = recognise(paths)
    check_output(out, recognised.paths(), settings)
    inputs = open_inputs(recognised, streamed, mtp=settings.mtp)
    for source in inputs.sources():
        reporter.detail(f"{source.kind}: {source.path}, {len(source.files)} files")
    inputs = replace(inputs, assets=_sound_text(inputs, settings, reporter), unreadable={})
    cross_check = None
    if inputs.hf is not None and inputs.gguf is not None:
        cross_check = check_once(inputs.hf, inputs.gguf, streamed)
        reporter.say(
            f"both inputs hold the same model: {cross_check.num_tensors} tensors sampled, largest relative "
            f"error {cross_check.worst_relative_error:.2g} ({cross_check.worst_tensor})"
        )
    with nullcontext() if streamed is None else streamed.sizes_only():
        plan = plan_conversion(inputs.hf, inputs.gguf, settings, usable_memory_bytes())
        told = list(notices(plan, inputs))
    if streamed is not None:
        streamed.schedule(plan)
    calibration = None
    if settings.calibration is not None:
        calibration = load_calibration(settings.calibration, plan.spec)
    for notice in told:
        reporter.warn(notice)
    alarms = Alarms()
    for source in inputs.sources():
        look_into_holes(source, alarms)
    tell(alarms, reporter, force=settings.force_weights)
    return Prepared(inputs, plan.settings, plan, cross_check, calibration, out, streamed)


def _sound_text(inputs: OpenInputs, settings: ConvertSettings, reporter: Reporter) -> dict[str, bytes]:
    source = inputs.sources()[0]
    where, rows = str(source.path), source.spec.vocab
    return sound_text(inputs.assets, inputs.unreadable, where, rows, reporter, force=settings.force_text)


def check_output(out: Path, sources: Sequence[Path], settings: ConvertSettings) -> None:
    """UsageError when the output has an impossible name, lies inside an input, has no parent folder, or is
    something that may not be replaced. A bundle without --force is left to ``convert``, which looks closer.
    """
    check_name(out)
    check_apart(out, sources)
    if not out.parent.is_dir():
        raise UsageError("the folder for the output does not exist", where=str(out.parent))
    if not os.path.lexists(out):
        return
    if not settings.replace:
        if out.is_symlink() or not (out / MANIFEST_NAME).is_file() or settings.restart:
            raise _exists(out)
    else:
        check_replaceable(out, replace=True)


def _exists(out: Path) -> UsageError:
    return UsageError("the output exists already", where=str(out), hint="--force replaces it")


def dry_run(prepared: Prepared) -> DryRun:
    """The plan with sizes, memory, disk and time. Writes nothing. UsageError if the output is there."""
    plan = prepared.plan
    if os.path.lexists(prepared.out) and not prepared.settings.replace:
        raise _exists(prepared.out)
    return DryRun(
        tier_bytes=plan.tier_bytes(),
        output_bytes=plan.shards.total_bytes,
        num_files=len(plan.shards.files),
        source_bytes=plan.input_bytes,
        free_disk_bytes=free_disk_bytes(prepared.out),
        needed_disk_bytes=needed_disk_bytes(
            plan.shards.total_bytes, allocated_bytes(partial_path(prepared.out))
        ),
        memory_bytes=plan.memory.total_bytes,
        estimate=Estimate(0.0, 0.0) if prepared.streamed is not None else estimate(plan),
        layouts=prepared.settings.layouts(),
        resumable=is_resumable(prepared.out),
    )


def check_room(prepared: Prepared) -> None:
    """Raises ResourceError, with the figures, where memory, disk or the size of a file does not suffice, or
    where nothing can be written.
    """
    plan, out = prepared.plan, prepared.out
    check_writable(out)
    check_memory(plan.memory.total_bytes)
    largest = max((file.num_bytes for file in plan.shards.files), default=0)
    check_file_size(out, largest, max((blob.num_bytes for blob in plan.blobs), default=0))
    # What an earlier run holds is used again, or freed first.
    need, held = plan.shards.total_bytes, allocated_bytes(partial_path(out))
    if prepared.streamed is not None:
        need, held = need + prepared.streamed.allowed_bytes, held + prepared.streamed.held_bytes()
    check_disk(out, need, held)


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """What a resume must find unchanged, as JSON types."""
    plan = prepared.plan
    places = "".join(
        f"{file.name} {file.num_bytes} {blob.spec.name} {blob.offset_bytes} {blob.spec.num_bytes}\n"
        for file in plan.shards.files
        for blob in file.blobs
    )
    return {
        "tool_version": tool_version(),
        "recipe": recipe(prepared),
        "sources": {
            source.kind: [file.fingerprint() for file in source.files] for source in prepared.inputs.sources()
        },
        "assets": {
            name: xxhash.xxh3_128_hexdigest(data) for name, data in sorted(prepared.inputs.assets.items())
        },
        "plan": xxhash.xxh3_128_hexdigest(places.encode()),
    }


def recipe(prepared: Prepared) -> dict[str, Any]:
    """The settings and roles that decide the bundle's bytes."""
    plan, settings = prepared.plan, prepared.settings
    record = settings.recipe()
    record["dense_from"] = plan.dense_source.kind
    for tier in settings.tiers:
        source = plan.expert_source(tier)
        record[f"{tier}_experts_from"] = f"{source.kind}: {', '.join(source.expert_types())}"
    if prepared.calibration is not None:
        record["calibration"] = prepared.calibration.digest
    return record


def convert(prepared: Prepared, reporter: Reporter, io: FileOps | None = None) -> Summary:
    """Writes the bundle, or continues an earlier run.

    Raises KrasisError; whatever happens, the output is whole or absent.
    """
    io = io or FileOps()
    plan, out, settings = prepared.plan, prepared.out, prepared.settings
    begin_s = time.monotonic()
    complete = _complete(prepared, reporter, io)
    if complete is not None:
        return _earlier_summary(prepared, complete, time.monotonic() - begin_s)
    check_room(prepared)
    with open_partial(
        out,
        plan.shards,
        fingerprint(prepared),
        io,
        restart=settings.restart,
        output_io=settings.output_io,
    ) as partial:
        if partial.finished:
            reporter.say(
                f"continuing {partial_path(out)}: {len(partial.finished)} of {len(plan.units)} steps are done"
            )
        result = _write(prepared, partial, reporter)
        output_io = partial.writer.output_description
    return Summary(
        out=out,
        tier_bytes=plan.tier_bytes(),
        total_bytes=sum(file.stat().st_size for file in out.iterdir()),
        source_bytes=result.source_bytes,
        elapsed_s=time.monotonic() - begin_s,
        peak_bytes=result.peak_bytes,
        quality=_quality(prepared, result),
        resumed_units=len(partial.finished),
        output_io=output_io,
    )


def _complete(prepared: Prepared, reporter: Reporter, io: FileOps) -> Manifest | None:
    """The manifest of the output that an earlier run of this conversion made; None if there is no output.

    Raises UsageError for another output that may not be replaced.
    """
    plan, out, settings = prepared.plan, prepared.out, prepared.settings
    if not os.path.lexists(out):
        return None
    manifest = None if settings.restart else finish_earlier_run(out, fingerprint(prepared), io)
    if manifest is None and settings.replace:
        return None
    if manifest is None and prepared.streamed is None:  # else all would have to be downloaded again
        manifest = same_bundle(out, plan, prepared.inputs, recipe(prepared), tool_version(), reporter)
    if manifest is None:
        raise _exists(out)
    if settings.full_verify:
        verify_checksums(plan, out, {blob.name: blob.xxh3_128 for blob in manifest.blobs})
    return manifest


def _earlier_summary(prepared: Prepared, manifest: Manifest, elapsed_s: float) -> Summary:
    return Summary(
        out=prepared.out,
        tier_bytes=prepared.plan.tier_bytes(),
        total_bytes=sum(file.stat().st_size for file in prepared.out.iterdir()),
        source_bytes=0,
        elapsed_s=elapsed_s,
        peak_bytes=0,
        quality=manifest.quality,
        resumed_units=len(prepared.plan.units),
        output_io="an earlier run",
        was_complete=True,
    )


def _write(prepared: Prepared, partial: Partial, reporter: Reporter) -> PipelineResult:
    plan, settings, writer = prepared.plan, prepared.settings, partial.writer
    result = run_units(
        plan,
        writer,
        partial.journal,
        partial.finished,
        prepared.calibration,
        reporter,
        prepared.streamed,
    )
    for source in prepared.inputs.sources():
        for file in source.files:
            file.check_unchanged()
    quality = [result.quality[unit.name] for unit in plan.units]
    assets = [writer.write_asset(name, data) for name, data in sorted(prepared.inputs.assets.items())]
    assets.append(writer.write_asset(REPORT_NAME, report_bytes(quality, len(plan.spec.layers))))
    num_compared = verify_sample(plan, writer.path, result.quality)
    reporter.detail(f"the shards were written by {writer.output_description}")
    reporter.detail(f"{num_compared} experts read back and compared with their source")
    if settings.full_verify:
        reporter.say(f"reading back {format_bytes(sum(plan.tier_bytes().values()))} to check every checksum")
        verify_checksums(plan, writer.path, result.blobs)
    manifest = _manifest(prepared, result, assets)
    with stop_signals.deferred():  # what is complete is not called stopped
        writer.finish(manifest, prepared.out, replace=settings.replace, scratch=[JOURNAL_NAME])
    return result


def _quality(prepared: Prepared, result: PipelineResult) -> dict[str, Any]:
    samples = {}
    if prepared.cross_check is not None:
        samples["gguf.experts.sampled"] = prepared.cross_check.experts
    return manifest_quality([result.quality[unit.name] for unit in prepared.plan.units], samples)


def _manifest(prepared: Prepared, result: PipelineResult, assets: Sequence[AssetRecord]) -> Manifest:
    plan = prepared.plan
    sources = []
    for source in prepared.inputs.sources():
        for file in source.files:
            digest = result.digests.combined(source.kind, file.tensors)
            if digest is not None:  # else nothing of this file went into the bundle
                sources.append(SourceRecord(file.name, source.kind, file.num_bytes, digest))
    return Manifest(
        tool_version=tool_version(),
        spec=plan.spec,
        layouts=prepared.settings.layouts(),
        files=plan.shards.file_records(),
        blobs=plan.shards.blob_records(result.blobs),
        assets=tuple(assets),
        sources=tuple(sources),
        recipe=recipe(prepared),
        quality=_quality(prepared, result),
        format_minor=minor_of(plan.spec),
    )
