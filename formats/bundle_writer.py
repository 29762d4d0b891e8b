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
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from krasis.formats.assets import compress_asset
from krasis.formats.errors import FormatError, MismatchError
from krasis.formats.file_ops import FileOps, io_errors, sync_directory, write_all
from krasis.formats.limits import HUGE_PAGE_BYTES, MIB
from krasis.formats.manifest import MANIFEST_NAME, AssetRecord, Manifest
from krasis.formats.manifest_records import ASSET_SUFFIX, BlobRecord, FileRecord
from krasis.formats.names import check_file_name, shown
from krasis.formats.publish import PARTIAL_SUFFIX, publish
from krasis.formats.regular_file import open_regular, read_range
from krasis.formats.shard_plan import BlobSpec, PlacedBlob, ShardFile, ShardPlan, plan_shards

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

_MAX_WRITE_BYTES = 64 * MIB
_TEMPORARY_SUFFIX = ".tmp"

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.generic]


class BundleWriter:
    """The shards of one partial bundle. Blobs may be written by several threads, each blob by one.

    Use ``create`` or ``reopen`` first and ``close`` (or ``with``) at the end.
    """

    def __init__(
        self, partial_dir: str | os.PathLike[str], plan: ShardPlan, *, io: FileOps | None = None
    ) -> None:
        self.path = Path(partial_dir)
        self.plan = plan
        self._io = io or FileOps()
        self._fds: dict[str, int] = {}
        self._places: dict[str, tuple[ShardFile, PlacedBlob]] = {
            blob.spec.name: (file, blob) for file in plan.files for blob in file.blobs
        }
        self._open_sinks: set[str] = set()
        self._lock = threading.Lock()

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
                self._fds[file.name] = fd
            with io_errors(f"reserving {file.num_bytes} bytes for a shard", path):
                self._io.fallocate(fd, file.num_bytes)
            with io_errors("writing a shard's header", path):
                write_all(self._io, fd, file.header, 0)
                self._io.fsync(fd)
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
                self._fds[file.name] = self._io.open(path, os.O_RDWR | os.O_NOFOLLOW)

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
        return BlobSink(self, file, blob)

    def sync_blob(self, name: str) -> None:
        """Makes the data of the blob's shard durable. ResourceError if the system refuses."""
        file, _ = self._places[name]
        with io_errors("writing to disk", self.path / file.name):
            self._io.fdatasync(self._fd(file.name))

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
                self._io.fsync(self._fd(file.name))
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

    def _fd(self, file_name: str) -> int:
        fd = self._fds.get(file_name)
        if fd is None:
            raise FormatError("the bundle is not open for writing", where=str(self.path / file_name))
        return fd

    def close(self) -> None:
        """Closes the shards. What is not synced may be lost. Calling it again does nothing."""
        while self._fds:
            name, fd = self._fds.popitem()
            with io_errors("closing a shard", self.path / name):
                self._io.close(fd)

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_name(records: Iterable[FileRecord | BlobRecord]) -> dict[str, FileRecord | BlobRecord]:
    return {record.name: record for record in records}


class BlobSink:
    """Takes a blob's bytes in order and hashes them. ``close`` must follow, or leaving ``with`` gives the
    blob up.

    Writes end at multiples of 2 MiB of the file where they can: the page cache then keeps the file in huge
    pages.
    """

    __slots__ = ("_blob", "_file", "_hash", "_is_closed", "_position", "_tail", "_writer")

    def __init__(self, writer: BundleWriter, file: ShardFile, blob: PlacedBlob) -> None:
        self._writer, self._file, self._blob = writer, file, blob
        self._hash = xxhash.xxh3_128()
        self._tail = bytearray()  # not yet written: less than 2 MiB, ending at _position
        self._position = blob.offset_bytes
        self._is_closed = False

    def write(self, data: Buffer) -> None:
        """Appends bytes (any C-contiguous buffer). FormatError beyond the blob's size, ResourceError on I/O
        errors.
        """
        name = self._blob.spec.name
        if self._is_closed:
            raise FormatError("blob is closed", where=shown(name))
        view = memoryview(data)  # type: ignore[arg-type]  # NumPy's stubs hide that arrays are buffers
        # An empty array cannot be cast to bytes.
        view = view.cast("B") if view.nbytes else memoryview(b"")
        end = self._blob.offset_bytes + self._blob.spec.num_bytes
        if self._position + len(view) > end:
            raise FormatError(
                "more data than the blob has room for",
                where=f"{self._file.name}: {shown(name)}",
                got=self._position + len(view) - self._blob.offset_bytes,
                limit=self._blob.spec.num_bytes,
            )
        self._hash.update(view)
        with io_errors("writing", self._writer.path / self._file.name):
            self._append(view)

    def _append(self, view: memoryview) -> None:
        start = self._position - len(self._tail)
        self._position += len(view)
        boundary = self._position // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if boundary <= start:
            self._tail += view
            return
        if self._tail:
            # Up to the next boundary from the tail, so that what follows can be written from the caller's
            # buffer.
            first = (start // HUGE_PAGE_BYTES + 1) * HUGE_PAGE_BYTES
            taken = first - start - len(self._tail)
            self._tail += view[:taken]
            self._put(memoryview(self._tail), start)
            view, start = view[taken:], first
            self._tail = bytearray()
        bulk = boundary - start
        self._put(view[:bulk], start)
        self._tail += view[bulk:]

    def _put(self, view: memoryview, offset: int) -> None:
        fd = self._writer._fd(self._file.name)
        for begin in range(0, len(view), _MAX_WRITE_BYTES):
            write_all(self._writer._io, fd, view[begin : begin + _MAX_WRITE_BYTES], offset + begin)

    def close(self) -> str:
        """Writes what is left and returns the XXH3-128 digest (hex). FormatError if data is missing.
        Idempotent.
        """
        if not self._is_closed:
            spec = self._blob.spec
            written = self._position - self._blob.offset_bytes
            if written != spec.num_bytes:
                raise FormatError(
                    "blob is incomplete",
                    where=f"{self._file.name}: {shown(spec.name)}",
                    got=written,
                    limit=spec.num_bytes,
                )
            with io_errors("writing", self._writer.path / self._file.name):
                self._put(memoryview(self._tail), self._position - len(self._tail))
            self._tail = bytearray()
            self._release()
        return str(self._hash.hexdigest())

    def _release(self) -> None:
        self._is_closed = True
        with self._writer._lock:
            self._writer._open_sinks.discard(self._blob.spec.name)

    def __enter__(self) -> BlobSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_closed:
            self._release()
