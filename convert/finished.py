"""Whether the output is there already, made of the same inputs with the same settings by an earlier run.

That run may have been killed behind the last rename, with its journal (and the bundle it replaced) left
over; then the journal says what it was made of. Without a journal, everything that the manifest knows is
compared, the contents of the sources included: a bundle of another model of the same shapes must not pass for
this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from krasis.convert.digests import ContentDigests
from krasis.convert.journal import JOURNAL_NAME, read_journal
from krasis.convert.opening import OpenInputs
from krasis.convert.partial import describe_difference, lock_folder, partial_path
from krasis.convert.plan import ConversionPlan
from krasis.convert.progress import Reporter
from krasis.convert.quality import REPORT_NAME
from krasis.convert.slices import TensorSlice
from krasis.convert.sources import WeightSource
from krasis.formats.bundle.manifest import MANIFEST_NAME, BlobRecord, Manifest
from krasis.formats.bundle.publish import remove_bundle
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, MismatchError
from krasis.formats.files.file_ops import FileOps, io_errors, sync_directory
from krasis.formats.models.tensors import dense_tensors_of


def finish_earlier_run(out: Path, fingerprint: Mapping[str, Any], io: FileOps) -> Manifest | None:
    """The manifest of a bundle that a killed run of this very conversion left at ``out``, tidied up.

    None if what lies there is anything else. Raises ResourceError if the system refuses, or while that run is
    still at it.
    """
    if out.is_symlink() or not (out / JOURNAL_NAME).is_file():
        return None
    try:
        header = read_journal(out)[0]
        if header is None or describe_difference(header["fingerprint"], fingerprint) is not None:
            return None
        with Bundle.open(out) as bundle:
            manifest = bundle.manifest
    except (FormatError, MismatchError):
        return None
    fd = lock_folder(out)
    try:
        with io_errors("removing a scratch file", out / JOURNAL_NAME):
            io.unlink(out / JOURNAL_NAME)
        replaced = partial_path(out)
        # Where names were exchanged, the bundle that was replaced lies there now.
        if (replaced / MANIFEST_NAME).is_file() and not os.path.lexists(replaced / JOURNAL_NAME):
            remove_bundle(replaced, io=io)
        sync_directory(out.absolute().parent, io)
    finally:
        os.close(fd)
    return manifest


def same_bundle(
    out: Path,
    plan: ConversionPlan,
    inputs: OpenInputs,
    recipe: Mapping[str, Any],
    tool_version: str,
    reporter: Reporter,
) -> Manifest | None:
    """The manifest of the bundle at ``out`` if this conversion would write the same; None if not.

    Reads all sources once if nothing cheaper tells them apart.
    """
    if out.is_symlink():
        return None
    try:
        with Bundle.open(out) as bundle:
            manifest = bundle.manifest
            if not _looks_same(manifest, plan, recipe, tool_version) or not _same_texts(bundle, inputs):
                return None
    except FormatError:
        return None
    return manifest if _same_sources(manifest, plan, inputs, reporter) else None


def _looks_same(
    manifest: Manifest, plan: ConversionPlan, recipe: Mapping[str, Any], tool_version: str
) -> bool:
    names = [blob.spec.name for file in plan.shards.files for blob in file.blobs]
    return (
        manifest.tool_version == tool_version
        and dict(manifest.recipe) == dict(recipe)
        and manifest.spec == plan.spec
        and dict(manifest.layouts) == plan.settings.layouts()
        and sorted(manifest.files, key=str) == sorted(plan.shards.file_records(), key=str)
        and _places(manifest.blobs) == _places(plan.shards.blob_records(dict.fromkeys(names, "")))
    )


def _places(blobs: Iterable[BlobRecord]) -> dict[str, BlobRecord]:
    """Blobs by name, whatever their contents."""
    return {blob.name: replace(blob, xxh3_128="") for blob in blobs}


def _same_texts(bundle: Bundle, inputs: OpenInputs) -> bool:
    names = {asset.name for asset in bundle.manifest.assets} - {REPORT_NAME}
    return names == set(inputs.assets) and all(bundle.asset(name) == inputs.assets[name] for name in names)


def _same_sources(manifest: Manifest, plan: ConversionPlan, inputs: OpenInputs, reporter: Reporter) -> bool:
    known = {(source.kind, source.name): source for source in manifest.sources}
    files = {(source.kind, file.name): file for source in inputs.sources() for file in source.files}
    if any(key not in files or files[key].num_bytes != known[key].num_bytes for key in known):
        return False
    reporter.say("the output is there already and looks the same: its sources are compared with these")
    digests = _digests(plan, reporter)
    found = {key: digests.combined(key[0], file.tensors) for key, file in files.items()}
    return {key: digest for key, digest in found.items() if digest is not None} == {
        key: source.digest for key, source in known.items()
    }


def _digests(plan: ConversionPlan, reporter: Reporter) -> ContentDigests:
    """The digest of every tensor that a conversion reads."""
    digests = ContentDigests()
    spec = plan.spec

    def add(source: WeightSource, piece: TensorSlice) -> None:
        piece.touch()
        digests.add(source.kind, piece)
        reporter.advance(piece.raw.nbytes)
        source.release([piece])

    reporter.begin(plan.source_bytes, 0)
    try:
        for layer in (None, *range(len(spec.layers))):
            for tensor in dense_tensors_of(spec, layer):
                for one in plan.dense_source.dense(tensor, layer):
                    add(plan.dense_source, one.piece)
            if layer is not None and spec.layers[layer].ngram:
                for one in plan.dense_source.tables.parts(layer):
                    add(plan.dense_source, one.piece)
            for tier in plan.settings.tiers if layer in spec.expert_layers else ():
                source = plan.expert_source(tier)
                for expert in range(spec.experts_of(layer).count):
                    for part in source.parts(layer):
                        add(source, source.expert(layer, expert, part))
    finally:
        reporter.end()
    return digests
