"""Writes a bundle into ``X.partial``: shards preallocated, blobs in any order, the manifest last, then one
rename.

All changes to the file system go through ``FileOps``. Until ``finish`` has renamed the directory, nothing
opens as a bundle.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

import xxhash

from krasis.formats.bundle.assets import compress_asset
from krasis.formats.bundle.blob_sink import BlobSink
from krasis.formats.bundle.manifest import MANIFEST_NAME, AssetRecord, Manifest
from krasis.formats.bundle.manifest_records import ASSET_SUFFIX, BlobRecord, FileRecord
from krasis.formats.bundle.publish import publish
from krasis.formats.bundle.shard_output import DirectIo, OutputIo, ShardOutput
from krasis.formats.bundle.shard_plan import BlobSpec, PlacedBlob, ShardFile, ShardPlan, plan_shards
from krasis.formats.errors import FormatError, MismatchError
from krasis.formats.files.file_ops import PARTIAL_SUFFIX, FileOps, io_errors, sync_directory, write_all
from krasis.formats.files.regular_file import open_regular, read_range
from krasis.formats.names import check_file_name, shown

__all__ = [
    "PARTIAL_SUFFIX",
    "BlobSink",
    "BlobSpec",
    "BundleWriter",
    "FileOps",
    "ShardPlan",
    "plan_shards",
    "publish",
]

_TEMPORARY_SUFFIX = ".tmp"


class BundleWriter:
    """The shards of one partial bundle. Blobs may be written by several threads, each blob by one.

    Use ``create`` or ``reopen`` first and ``close`` (or ``with``) at the end.
    """

    def __init__(
        self,
        partial_dir: str | os.PathLike[str],
        plan: ShardPlan,
        *,
        io: FileOps | None = None,
        output_io: OutputIo = "auto",
    ) -> None:
        """output_io: whether shards are written past the page cache; see ``shard_output.DirectIo``."""
        self.path = Path(partial_dir)
        self.plan = plan
        self._io = io or FileOps()
        self._direct = DirectIo(output_io)
        self._outputs: dict[str, ShardOutput] = {}
        self._places: dict[str, tuple[ShardFile, PlacedBlob]] = {
            blob.spec.name: (file, blob) for file in plan.files for blob in file.blobs
        }
        self._open_sinks: set[str] = set()
        self._lock = threading.Lock()

    @property
    def output_description(self) -> str:
        """How shards are written, and why, for a person."""
        return self._direct.description

    def create(self) -> None:
        """Makes the directory (which must not exist) and all shards at full size, headers written and
        durable.

        Raises ResourceError if the disk is too small or the system refuses.
        """
        with io_errors("creating the directory", self.path):
            self._io.mkdir(self.path)
        for file in self.plan.files:
            path = self.path / file.name
            with io_errors("creating a shard", path):
                fd = self._io.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
            output = self._outputs[file.name] = ShardOutput(path, fd, self._io, self._direct)
            with io_errors(f"reserving {file.num_bytes} bytes for a shard", path):
                self._io.fallocate(fd, file.num_bytes)
            with io_errors("writing a shard's header", path):
                write_all(self._io, fd, file.header, 0)
                self._io.fsync(fd)
            output.open_direct()
        sync_directory(self.path, self._io)

    def reopen(self) -> None:
        """Opens an interrupted conversion's shards. MismatchError if they are not exactly this plan's."""
        for file in self.plan.files:
            path = self.path / file.name
            try:
                fd = open_regular(path, follow_links=False)
            except FormatError as error:
                raise self._not_ours(path, error.what) from error
            try:
                size = os.fstat(fd).st_size
                if size != file.num_bytes:
                    raise self._not_ours(path, f"{size} bytes instead of {file.num_bytes}")
                if read_range(fd, 0, len(file.header), str(path)) != file.header:
                    raise self._not_ours(path, "another header")
            finally:
                os.close(fd)
            with io_errors("opening a shard", path):
                fd = self._io.open(path, os.O_RDWR | os.O_NOFOLLOW)
            output = self._outputs[file.name] = ShardOutput(path, fd, self._io, self._direct)
            output.open_direct()

    def _not_ours(self, path: Path, got: str) -> MismatchError:
        return MismatchError(
            "the interrupted conversion does not fit this one",
            where=str(path),
            got=got,
            hint=f"remove {self.path} to begin anew",
        )

    def open_blob(self, name: str) -> BlobSink:
        """A sink for a planned blob, which is then written from its start. FormatError if it is unknown or
        already open.
        """
        place = self._places.get(name)
        if place is None:
            raise FormatError("blob is not part of the plan", where=shown(name))
        file, blob = place
        with self._lock:
            if name in self._open_sinks:
                raise FormatError("blob is already being written", where=shown(name))
            self._open_sinks.add(name)

        def released() -> None:
            with self._lock:
                self._open_sinks.discard(name)

        return BlobSink(lambda: self._output(file.name), blob, released)

    def sync_blob(self, name: str) -> None:
        """Makes the data of the blob's shard durable. ResourceError if the system refuses."""
        file, _ = self._places[name]
        with io_errors("writing to disk", self.path / file.name):
            self._io.fdatasync(self._output(file.name).fd)

    def write_asset(self, name: str, data: bytes) -> AssetRecord:
        """Writes ``name``.zst (replacing one of an interrupted conversion), durable. Returns the manifest's
        record.
        """
        check_file_name(name, "asset")
        path = self.path / (name + ASSET_SUFFIX)
        packed = compress_asset(data, str(path))
        self._write_file(path, packed)
        return AssetRecord(name, path.name, len(packed), len(data), xxhash.xxh3_128_hexdigest(packed))

    def finish(
        self,
        manifest: Manifest,
        final_dir: str | os.PathLike[str],
        replace: bool = False,
        *,
        scratch: Iterable[str] = (),
    ) -> None:
        """Syncs everything, writes the manifest, renames the directory to ``final_dir``. The writer is
        closed.

        scratch: names of the conversion's own files in the directory, removed at the very end. May be
        repeated after a failure. Raises MismatchError if the manifest is not of this plan, UsageError if
        ``final_dir`` exists and may not be replaced, ResourceError if the system refuses.
        """
        self._check_manifest(manifest)
        data = manifest.to_bytes()
        for file in self.plan.files:
            with io_errors("writing to disk", self.path / file.name):
                self._io.fsync(self._output(file.name).fd)
        self.close()
        sync_directory(self.path, self._io)
        # The manifest's name appears only when everything that it speaks of is durable.
        temporary = self.path / (MANIFEST_NAME + _TEMPORARY_SUFFIX)
        self._write_file(temporary, data)
        with io_errors("naming the manifest", self.path / MANIFEST_NAME):
            self._io.rename(temporary, self.path / MANIFEST_NAME)
        sync_directory(self.path, self._io)
        publish(self.path, Path(final_dir), replace=replace, scratch=scratch, io=self._io)

    def _check_manifest(self, manifest: Manifest) -> None:
        digests = {blob.name: blob.xxh3_128 for blob in manifest.blobs}
        is_ours = digests.keys() == self._places.keys() and _by_name(manifest.files) == _by_name(
            self.plan.file_records()
        )
        if not is_ours or _by_name(manifest.blobs) != _by_name(self.plan.blob_records(digests)):
            raise MismatchError(
                "the manifest does not describe the shards that were written", where=str(self.path)
            )
        if self._open_sinks:
            raise FormatError(
                "a blob is still being written", where=str(self.path), got=sorted(self._open_sinks)[0]
            )

    def _write_file(self, path: Path, data: bytes) -> None:
        with io_errors("writing a file", path):
            fd = self._io.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
            try:
                write_all(self._io, fd, data, 0)
                self._io.fsync(fd)
            finally:
                self._io.close(fd)

    def _output(self, file_name: str) -> ShardOutput:
        output = self._outputs.get(file_name)
        if output is None:
            raise FormatError("the bundle is not open for writing", where=str(self.path / file_name))
        return output

    def close(self) -> None:
        """Closes the shards. What is not synced may be lost. Calling it again does nothing."""
        while self._outputs:
            self._outputs.popitem()[1].close()

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_name(records: Iterable[FileRecord | BlobRecord]) -> dict[str, FileRecord | BlobRecord]:
    return {record.name: record for record in records}
