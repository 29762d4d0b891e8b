"""Checks every byte of a bundle: headers, blobs and assets against their digests, fillers for zeros, the
directory for strangers; and whether the bundle stayed the same meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from krasis.formats.bundle.blob_names import check_blob_names
from krasis.formats.bundle.code_ranges import code_range
from krasis.formats.bundle.manifest import MANIFEST_NAME, AssetRecord, BlobRecord, FileRecord
from krasis.formats.bundle.publish import SCRATCH_PREFIXES
from krasis.formats.bundle.reader import Bundle
from krasis.formats.checkpoints.safetensors import TensorInfo
from krasis.formats.errors import FormatError, KrasisError, MismatchError, ResourceError
from krasis.formats.files.folder_snapshot import FolderSnapshot
from krasis.formats.limits import MIB
from krasis.formats.names import shown
from krasis.formats.process.machine_limits import usable_cpus

_CHUNK_BYTES = 4 * MIB
_MAX_THREADS = 16

Progress = Callable[[int], None]
Verdict = Literal["intact", "damaged", "changed", "unreadable"]
EXIT_CODES: dict[Verdict, int] = {
    "intact": 0,
    "damaged": FormatError.exit_code,
    "changed": MismatchError.exit_code,
    "unreadable": ResourceError.exit_code,
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as the manifest says. where: file and blob; what: a sentence.

    kind: ``damaged``: the bytes are wrong; ``changed``: the file was not the same all the time, so nothing
    can be said about it; ``unreadable``: the system did not show it (permission, too many open files, a
    failing disk), so nothing can be said either.
    """

    where: str
    what: str
    kind: Verdict = "damaged"

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verdict(problems: Iterable[Problem]) -> Verdict:
    """The gravest kind among the problems: certain damage, then changes, then what could not be read."""
    kinds = {problem.kind for problem in problems}
    order: tuple[Verdict, ...] = ("damaged", "changed", "unreadable")
    return next((kind for kind in order if kind in kinds), "intact")


def verify_bundle(
    path: str | os.PathLike[str], progress: Progress | None = None, *, num_threads: int = 0
) -> list[Problem]:
    """Reads the whole bundle and lists what is wrong, in order of file and place; an empty list means intact.

    progress: called with the number of bytes just checked, from several threads; they add up to
    ``verify_bytes``. num_threads: 0 = as many as this process has CPUs. A bundle that cannot even be opened
    gives its one problem. Files that did not stay the same from beginning to end give a ``changed`` problem
    instead of any other.
    """
    path = Path(path)
    before = FolderSnapshot.take_settled(path)
    problems = _check(path, progress or (lambda _: None), num_threads)
    problems = _with_changes(path, problems, before, FolderSnapshot.take(path))
    return sorted(problems, key=lambda problem: problem.where)


def _check(path: Path, report: Progress, num_threads: int) -> list[Problem]:
    try:
        bundle = Bundle.open(path)
    except KrasisError as error:
        return [_problem(error, str(path))]
    with bundle:
        jobs: list[Callable[[], list[Problem]]] = [
            *(_header_job(bundle, file) for file in bundle.manifest.files),
            *(_blob_job(bundle, blob, report) for blob in bundle.manifest.blobs),
            *(
                _filler_job(bundle, file, item, report)
                for file, items in bundle.fillers.items()
                for item in items
            ),
            *(_asset_job(bundle, asset, report) for asset in bundle.manifest.assets),
        ]
        count = num_threads or min(_MAX_THREADS, usable_cpus())
        problems = _names(bundle)
        with ThreadPoolExecutor(max(1, count)) as pool:
            try:
                for future in as_completed([pool.submit(job) for job in jobs]):
                    problems += future.result()
            except BaseException:  # Ctrl-C, a signal: what has not begun need not be waited for
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return problems + _strangers(bundle)


def _with_changes(
    path: Path, problems: list[Problem], before: FolderSnapshot, after: FolderSnapshot
) -> list[Problem]:
    """Says nothing about the contents of files that were not the same all the time."""
    for look in (before, after):
        if look.refusal and not problems:
            return [Problem(str(path), f"the folder cannot be read: {look.refusal}", "unreadable")]
    if before.folder is None or after.refusal:
        return problems
    if before.folder != after.folder:
        what = "the bundle was removed or replaced while it was checked: check again"
        return [Problem(str(path), what, "changed")]
    found = before.differences(after)
    changes = [
        Problem(str(path / name), f"the file {what} while it was checked: check again", "changed")
        for name, what in found.items()
        if not name.startswith(SCRATCH_PREFIXES)
    ]
    if MANIFEST_NAME in found:  # everything else was compared with what it said
        return changes
    places = tuple(f"{change.where}: " for change in changes)
    return [one for one in problems if not f"{one.where}: ".startswith(places)] + changes


def verify_bytes(bundle: Bundle) -> int:
    """Bytes that ``verify_bundle`` reports as progress in all."""
    fillers = sum(item.num_bytes for items in bundle.fillers.values() for item in items)
    manifest = bundle.manifest
    return (
        fillers
        + sum(item.num_bytes for item in manifest.blobs)
        + sum(item.num_bytes for item in manifest.assets)
    )


def _chunks(bundle: Bundle, file: str, offset: int, num_bytes: int, report: Progress) -> Iterator[bytes]:
    for begin in range(0, num_bytes, _CHUNK_BYTES):
        chunk = bundle.read_file_range(file, offset + begin, min(_CHUNK_BYTES, num_bytes - begin))
        yield chunk
        report(len(chunk))


def _header_job(bundle: Bundle, file: FileRecord) -> Callable[[], list[Problem]]:
    """Once more, because opening looked at it before anything was known to stay as it is."""
    where = str(bundle.path / file.name)

    def run() -> list[Problem]:
        raw = bundle.read_file_range(file.name, 0, file.header_bytes)
        if xxhash.xxh3_128_hexdigest(raw) == file.header_xxh3_128:
            return []
        return [Problem(where, "header was altered: get this file again")]

    return _guarded(run, where)


def _blob_job(bundle: Bundle, blob: BlobRecord, report: Progress) -> Callable[[], list[Problem]]:
    def run() -> list[Problem]:
        digest, codes = xxhash.xxh3_128(), code_range(bundle.manifest, blob)
        for chunk in _chunks(bundle, blob.file, blob.offset_bytes, blob.num_bytes, report):
            digest.update(chunk)
            if codes is not None:
                codes.add(chunk)
        if digest.hexdigest() == blob.xxh3_128:
            if codes is None or codes.first is None:
                return []
            what = f"byte {codes.first} is the code -128, which no packer writes: convert the model again"
            return [Problem(f"{bundle.path / blob.file}: {blob.name}", what)]
        return [Problem(f"{bundle.path / blob.file}: {blob.name}", "data was altered: get this file again")]

    return _guarded(run, f"{bundle.path / blob.file}: {blob.name}")


def _filler_job(bundle: Bundle, file: str, item: TensorInfo, report: Progress) -> Callable[[], list[Problem]]:
    where = f"{bundle.path / file}: {item.name}"

    def run() -> list[Problem]:
        is_zero = True
        for chunk in _chunks(bundle, file, item.offset_bytes, item.num_bytes, report):
            is_zero &= chunk.count(0) == len(chunk)
        return [] if is_zero else [Problem(where, "padding was altered: it must be zero")]

    return _guarded(run, where)


def _asset_job(bundle: Bundle, asset: AssetRecord, report: Progress) -> Callable[[], list[Problem]]:
    def run() -> list[Problem]:
        bundle.asset(asset.name)
        report(asset.num_bytes)
        return []

    return _guarded(run, str(bundle.path / asset.file))


def _guarded(run: Callable[[], list[Problem]], where: str) -> Callable[[], list[Problem]]:
    """A file that cannot be read is a problem among others, not the end of the check."""

    def guarded() -> list[Problem]:
        try:
            return run()
        except KrasisError as error:
            return [_problem(error, where)]

    return guarded


def _problem(error: KrasisError, where: str) -> Problem:
    """An error's sentence without its place, which stands before it anyway."""
    what = str(error).removeprefix(f"{error.where}: ")
    return Problem(
        error.where or where, what, "unreadable" if isinstance(error, ResourceError) else "damaged"
    )


def _names(bundle: Bundle) -> list[Problem]:
    """Blobs that the architecture does not have, or lacks."""
    try:
        check_blob_names(bundle.manifest, str(bundle.path / MANIFEST_NAME))
    except KrasisError as error:
        return [_problem(error, str(bundle.path))]
    return []


def _strangers(bundle: Bundle) -> list[Problem]:
    """Files that the manifest does not know, scratch files apart."""
    manifest = bundle.manifest
    known = {
        MANIFEST_NAME,
        *(file.name for file in manifest.files),
        *(asset.file for asset in manifest.assets),
    }
    return [
        Problem(str(Path(bundle.path) / shown(name)), "this file is not part of the bundle")
        for name in bundle.entries()
        if name not in known and not name.startswith(SCRATCH_PREFIXES)
    ]
