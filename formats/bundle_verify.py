"""Checks every byte of a bundle: blobs and assets against their digests, fillers for zeros, the directory for
strangers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import xxhash

from krasis.formats.blob_names import check_blob_names
from krasis.formats.bundle_reader import Bundle
from krasis.formats.code_ranges import code_range
from krasis.formats.errors import KrasisError
from krasis.formats.limits import MIB
from krasis.formats.machine_limits import usable_cpus
from krasis.formats.manifest import MANIFEST_NAME, AssetRecord, BlobRecord
from krasis.formats.names import shown
from krasis.formats.publish import SCRATCH_PREFIXES
from krasis.formats.safetensors import TensorInfo

_CHUNK_BYTES = 4 * MIB
_MAX_THREADS = 16

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as the manifest says. where: file and blob; what: a sentence."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify_bundle(
    path: str | os.PathLike[str], progress: Progress | None = None, *, num_threads: int = 0
) -> list[Problem]:
    """Reads the whole bundle and lists what is wrong, in order of file and place; an empty list means intact.

    progress: called with the number of bytes just checked, from several threads; they add up to
    ``verify_bytes``. num_threads: 0 = as many as this process has CPUs. A bundle that cannot even be opened
    gives its one problem.
    """
    report = progress or (lambda _: None)
    try:
        bundle = Bundle.open(path)
    except KrasisError as error:
        return [Problem(error.where or str(path), _sentence(error))]
    with bundle:
        jobs: list[Callable[[], list[Problem]]] = [
            *(_blob_job(bundle, blob, report) for blob in bundle.manifest.blobs),
            *(
                _filler_job(bundle, file, item, report)
                for file, items in bundle.fillers.items()
                for item in items
            ),
            *(_asset_job(bundle, asset, report) for asset in bundle.manifest.assets),
        ]
        count = num_threads or min(_MAX_THREADS, usable_cpus())
        problems = [*_strangers(bundle), *_names(bundle)]
        with ThreadPoolExecutor(max(1, count)) as pool:
            for future in as_completed([pool.submit(job) for job in jobs]):
                problems += future.result()
    return sorted(problems, key=lambda problem: problem.where)


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
            return [Problem(error.where or where, _sentence(error))]

    return guarded


def _sentence(error: KrasisError) -> str:
    """The error's sentence without its place, which stands before it anyway."""
    return str(error).removeprefix(f"{error.where}: ")


def _names(bundle: Bundle) -> list[Problem]:
    """Blobs that the architecture does not have, or lacks."""
    try:
        check_blob_names(bundle.manifest, str(bundle.path / MANIFEST_NAME))
    except KrasisError as error:
        return [Problem(error.where, _sentence(error))]
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
