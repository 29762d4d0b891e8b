"""Downloads what a conversion needs of a model into the hub's cache, and checks it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars

from krasis.convert.progress import Reporter
from krasis.convert.resources import existing_parent
from krasis.formats.errors import ChecksumError, FormatError, ResourceError
from krasis.formats.hub.gguf_files import choose_gguf
from krasis.formats.hub.name import HubName
from krasis.formats.hub.needed import TEXT_FILES, Needed, needed_files
from krasis.formats.hub.repository import HubFile, Repository, open_or_cached
from krasis.formats.units import format_bytes

# The file system's own needs beside the downloaded files.
_RESERVE_BYTES = 64 << 20


def fetch_model(name: HubName, reporter: Reporter) -> Path:
    """The model in the cache, as a path for ``recognise``: a folder, or a GGUF's first file.

    Only what is needed is downloaded; what an earlier run left is used. Raises ResourceError where the disk
    is too small, ChecksumError for a download that is not what the hub says, and as ``hub_errors``.
    """
    found = open_or_cached(name)
    if isinstance(found, Path):
        reporter.say(f"{name}: the hub is not asked or does not answer; the cache is used ({found})")
        return _in_snapshot(name, found)
    needed = needed_files(found.files, name.variant, str(name), found.fetch)
    return download(found, needed, reporter)


def fetch_texts(name: HubName) -> Path:
    """The model's text files in the cache, as their folder; no weights. Raises FormatError if it has none,
    and as ``hub_errors``.
    """
    found = open_or_cached(name)
    if isinstance(found, Path):
        return found
    paths = [found.fetch(text) for text in TEXT_FILES if text in found.files]
    if not paths:
        raise FormatError(
            "this model has no text files on the hub", where=str(name), limit=", ".join(TEXT_FILES)
        )
    found.remember_revision()
    return paths[0].parent


def _in_snapshot(name: HubName, folder: Path) -> Path:
    """What is meant of a folder in the cache."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if not path.is_dir()]
    if name.variant is None and "config.json" in names:
        return folder
    return folder / choose_gguf(names, name.variant, str(name))[0]


def download(repository: Repository, needed: Needed, reporter: Reporter) -> Path:
    """Brings the needed files into the cache. Returns as ``fetch_model``."""
    missing = [repository.file(name) for name in needed.weights if repository.cached(name) is None]
    check_cache_room(repository, sum(file.num_bytes for file in missing))
    _quieten(reporter)
    if missing:
        total = format_bytes(sum(file.num_bytes for file in missing))
        count = f"{len(missing)} of {len(needed.weights)} files"
        reporter.say(
            f"{repository.name}: commit {repository.commit[:12]}, {count} to download ({total}) into "
            f"{constants.HF_HUB_CACHE}"
        )
    for text in needed.texts:
        repository.fetch(text)
    for number, file in enumerate(missing, 1):
        reporter.detail(f"file {number} of {len(missing)}: {file.name}, {format_bytes(file.num_bytes)}")
        check_download(repository.fetch(file.name), file, str(repository.name))
    repository.remember_revision()
    paths = [repository.fetch(name) for name in needed.weights]
    return paths[0] if needed.kind == "gguf" else paths[0].parent


def check_cache_room(repository: Repository, num_bytes: int) -> None:
    """Raises ResourceError when the cache's disk is too small for so many bytes more."""
    status = os.statvfs(existing_parent(Path(constants.HF_HUB_CACHE)))
    free = status.f_bavail * status.f_frsize
    if num_bytes and free < num_bytes + _RESERVE_BYTES:
        raise ResourceError(
            "not enough disk space for the download",
            where=f"{repository.name} into {constants.HF_HUB_CACHE}",
            got=f"{format_bytes(free)} free",
            limit=f"{format_bytes(num_bytes)} needed",
            hint="--drop-sources converts while it downloads and keeps none; or set HF_HOME to another disk",
        )


def check_download(path: Path, file: HubFile, where: str) -> None:
    """Compares size and SHA-256 with the hub's. Raises ChecksumError; a bad file is removed, so that it is
    downloaded again.
    """
    got: object = path.stat().st_size
    if got == file.num_bytes:
        if not file.has_sha256:
            return
        with path.open("rb") as stream:
            got = hashlib.file_digest(stream, "sha256").hexdigest()
        if got == file.digest:
            return
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    raise ChecksumError(
        "a downloaded file is not what the hub says it is",
        where=f"{where}: {file.name}",
        got=got,
        limit=file.digest if file.has_sha256 else file.num_bytes,
        hint="it was removed: run the same command again to download it anew",
    )


def _quieten(reporter: Reporter) -> None:
    """The library's own bars are for terminals."""
    if reporter.verbosity < 1 or not reporter.is_terminal:
        disable_progress_bars()
