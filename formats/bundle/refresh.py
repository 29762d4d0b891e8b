"""Puts other text files into a finished bundle, atomically and without copying its shards.

A second directory is made beside the bundle: hard links to the shards, the new text files, a manifest with
the old checksums of all weights. It then takes the bundle's name in one step. Killed at any point, the name
is the old bundle or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import xxhash

from krasis.formats.bundle.assets import compress_asset
from krasis.formats.bundle.manifest import MANIFEST_NAME, AssetRecord
from krasis.formats.bundle.manifest_records import ASSET_SUFFIX
from krasis.formats.bundle.publish import check_replaceable, publish, remove_bundle
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import ResourceError
from krasis.formats.files.file_ops import PARTIAL_SUFFIX, FileOps, io_errors, sync_directory, write_all
from krasis.formats.names import check_file_name

# Nobody opens a directory of such a name as a bundle, and a conversion's own partial one has another.
REFRESH_SUFFIX = ".refresh" + PARTIAL_SUFFIX
_TEMPORARY_SUFFIX = ".tmp"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS)


def replace_assets(
    path: Path, assets: Mapping[str, bytes], *, removed: Collection[str] = (), io: FileOps | None = None
) -> None:
    """Gives a bundle these text files (name -> contents) instead of those of the same names.

    removed: names that it shall no longer have. All others stay. Raises FormatError for what is no bundle or
    no text, UsageError if other things lie in its directory, ResourceError if the system refuses or somebody
    else is doing the same.
    """
    io = io or FileOps()
    path = path.absolute()
    if path.is_symlink():  # the name that is exchanged must be the directory's own
        path = path.resolve()
    with Bundle.open(path) as bundle:
        manifest, lock = bundle.manifest, _lock(path)
        try:
            check_replaceable(path, replace=True)
            folder = path.with_name(path.name + REFRESH_SUFFIX)
            if os.path.lexists(folder):
                remove_bundle(
                    folder, io=io
                )  # of a run that was killed; the links go, the bundle keeps its files
            with io_errors("creating the directory", folder):
                io.mkdir(folder)
            kept = [item for item in manifest.assets if item.name not in {*assets, *removed}]
            for name in (*(file.name for file in manifest.files), *(item.file for item in kept)):
                _link(path / name, folder / name, io)
            written = [_write_asset(folder, name, data, io) for name, data in sorted(assets.items())]
            records = tuple(sorted([*kept, *written], key=lambda item: item.name))
            sync_directory(folder, io)
            data = replace(manifest, assets=records).to_bytes()
            _write(folder / (MANIFEST_NAME + _TEMPORARY_SUFFIX), data, io)
            with io_errors("naming the manifest", folder / MANIFEST_NAME):
                io.rename(folder / (MANIFEST_NAME + _TEMPORARY_SUFFIX), folder / MANIFEST_NAME)
            sync_directory(folder, io)
            publish(folder, path, replace=True, io=io)
        finally:
            os.close(lock)


def _lock(path: Path) -> int:
    """An exclusive lock on the bundle's directory; it dies with the process."""
    with io_errors("opening the bundle", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ResourceError("its text files are being replaced by another process", where=str(path)) from None
    except OSError:  # some network file systems cannot lock folders
        return fd
    return fd


def _link(source: Path, target: Path, io: FileOps) -> None:
    try:
        io.link(source, target)
    except OSError as error:
        hint = ""
        if error.errno in _NO_LINKS:
            hint = "this needs hard links: move the bundle to a file system that has them, and own its files"
        raise ResourceError(
            f"linking a file failed: {error.strerror or error}", where=str(source), hint=hint
        ) from error


def _write_asset(folder: Path, name: str, data: bytes, io: FileOps) -> AssetRecord:
    check_file_name(name, "asset")
    path = folder / (name + ASSET_SUFFIX)
    packed = compress_asset(data, str(path))
    _write(path, packed, io)
    return AssetRecord(name, path.name, len(packed), len(data), xxhash.xxh3_128_hexdigest(packed))


def _write(path: Path, data: bytes, io: FileOps) -> None:
    with io_errors("writing a file", path):
        fd = io.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        try:
            write_all(io, fd, data, 0)
            io.fsync(fd)
        finally:
            io.close(fd)
