"""Opens a bundle: manifest and shard headers are checked in full, data is mapped when asked for and never
copied.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from krasis.formats.architecture_record import Architecture
from krasis.formats.bundle.assets import decompress_asset
from krasis.formats.bundle.manifest import MANIFEST_NAME, AssetRecord, BlobRecord, FileRecord, Manifest
from krasis.formats.bundle.manifest_records import FILLER_PREFIX
from krasis.formats.bundle.not_a_bundle import explain_file, explain_folder, refuse_pointer
from krasis.formats.checkpoints.safetensors import Header, TensorInfo, parse_header
from krasis.formats.dtypes import BUNDLE_DTYPES
from krasis.formats.errors import ChecksumError, FormatError, ResourceError, UsageError
from krasis.formats.files.file_kinds import ZSTD_MAGIC, refuse_text
from krasis.formats.files.file_mapping import FileMapping, prefault
from krasis.formats.files.file_ops import PARTIAL_SUFFIX, io_errors
from krasis.formats.files.folder_snapshot import FileState
from krasis.formats.files.regular_file import open_regular, read_range, read_small_file
from krasis.formats.limits import MAX_ASSET_BYTES, MAX_MANIFEST_BYTES, MIB
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.uniform import architecture_of
from krasis.formats.names import shown

_PREFAULT_BYTES = 64 * MIB
_NOT_FINISHED = "conversion incomplete; run the same krasis-convert command to resume"


class Bundle:
    """A bundle that was opened. Blobs are views of mapped files; they stay valid after ``close``.

    Several threads may use it, and any of them may close it: what another is reading is read to its end, and
    what is asked for later raises UsageError.

    Attributes: path, manifest, spec; fillers: file name -> the zero-filled ranges between its blobs.
    """

    path: Path
    manifest: Manifest
    fillers: dict[str, tuple[TensorInfo, ...]]
    _blobs: dict[str, BlobRecord]
    _assets: dict[str, AssetRecord]

    def __init__(self) -> None:
        """Use ``Bundle.open``."""
        self._directory = -1
        self._fds: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._states: dict[str, FileState] = {}
        self._mappings: dict[str, FileMapping] = {}
        # Of what follows. One thread may hold it twice: a signal's handler may close what it interrupts.
        self._lock = threading.RLock()
        self._num_users = 0
        self._is_closed = False
        self._run_as: ModelSpec | None = None
        self._main: ModelSpec | None = None
        self._architecture: Architecture | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Reads the manifest and checks every shard's size and header; touches no data.

        Raises FormatError for anything that is not a sound, finished bundle (VersionError for a newer one,
        ChecksumError for altered bytes), ResourceError if the system refuses.
        """
        self = cls()
        self.path = Path(path)
        self.fillers = {}
        try:
            self._directory = _open_directory(self.path)
            self.manifest = Manifest.from_bytes(self._read_manifest(), str(self.path / MANIFEST_NAME))
            blobs: dict[str, dict[str, BlobRecord]] = {file.name: {} for file in self.manifest.files}
            for blob in self.manifest.blobs:
                blobs[blob.file][blob.name] = blob
            for file in self.manifest.files:
                self._open_shard(file, blobs[file.name])
        except BaseException:
            self.close()
            raise
        self._blobs = {blob.name: blob for blob in self.manifest.blobs}
        self._assets = {asset.name: asset for asset in self.manifest.assets}
        return self

    def _read_manifest(self) -> bytes:
        path = self.path / MANIFEST_NAME
        try:
            os.stat(MANIFEST_NAME, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError as error:
            names = self.entries()
            is_shard = any(name.startswith(("dense-", "gpu-", "cpu-")) for name in names)
            if is_shard:
                raise FormatError(_NOT_FINISHED, where=str(path)) from error
            raise explain_folder(self.path, names) from error
        data = read_small_file(path, MAX_MANIFEST_BYTES, follow_links=False, dir_fd=self._directory)
        refuse_text(data, path)
        return data

    def _open_shard(self, file: FileRecord, blobs: dict[str, BlobRecord]) -> None:
        where = str(self.path / file.name)
        fd = open_regular(self.path / file.name, follow_links=False, dir_fd=self._directory)
        self._fds[file.name] = fd
        if os.fstat(fd).st_size != file.num_bytes:
            refuse_pointer(fd, where)
        size = _checked_size(fd, file.num_bytes, where, "the download may be incomplete")
        self._states[file.name] = FileState.of(os.fstat(fd))
        self._sizes[file.name] = size
        raw = read_range(fd, 0, file.header_bytes, where)
        if xxhash.xxh3_128_hexdigest(raw) != file.header_xxh3_128:
            raise ChecksumError("shard's header was altered", where=where, hint="get this file again")
        if int.from_bytes(raw[:8], "little") != file.header_bytes - 8:
            raise FormatError(
                "header has another size than the manifest says",
                where=where,
                got=int.from_bytes(raw[:8], "little") + 8,
                limit=file.header_bytes,
            )
        header = parse_header(raw, size, where)
        self.fillers[file.name] = _match_shard(header, blobs, where)

    @property
    def spec(self) -> ModelSpec:
        """The model: the manifest's without a layer that drafts, or as it is to be run."""
        if self._main is None:
            self._main = self.manifest.spec.main
        return self._run_as or self._main

    @property
    def architecture(self) -> Architecture:
        """The same as a flat record. Raises UnsupportedModelError for a model that this cannot describe."""
        if self._architecture is None:
            self._architecture = architecture_of(self.spec, str(self.path))
        return self._architecture

    def run_as(self, spec: ModelSpec) -> None:
        """Gives the model another rotary scaling than the manifest's, for whoever asks from now on.

        What was computed so is of another model: ``kv_file`` tells them apart.
        """
        self._run_as = None if spec == self.manifest.spec.main else spec
        self._architecture = None

    def blob(self, name: str) -> BlobRecord:
        """A blob's record. FormatError if the bundle has none of that name."""
        blob = self._blobs.get(name)
        if blob is None:
            raise FormatError("the bundle has no such blob", where=f"{self.path}: {shown(name)}")
        return blob

    def map(self, name: str) -> npt.NDArray[np.generic]:
        """A read-only view of a blob in its shape: U8 uint8, I8 int8, BF16 uint16 (bit patterns), F16, F32.

        Its file is mapped at the first use. Raises FormatError for an unknown name or a file whose size has
        changed since ``open``, ResourceError if it cannot be mapped.
        """
        blob = self.blob(name)
        flat = self._mapping(blob.file).view()[blob.offset_bytes : blob.offset_bytes + blob.num_bytes]
        return flat.view(BUNDLE_DTYPES[blob.dtype]).reshape(blob.shape)

    def mapping_of(self, file: str) -> tuple[int, int]:
        """(address, bytes) of a shard's mapping: valid while the bundle is open or a view of it is kept."""
        mapping = self._mapping(file)
        return mapping.address, mapping.num_bytes

    def _mapping(self, file: str) -> FileMapping:
        with self._lock:
            self._check_open()
            mapping = self._mappings.get(file)
            if mapping is None:
                fd = self._fd(file)
                # Shrunk by then, it would have ranges that are not there to read.
                hint = "it was changed while the bundle was open; get this file again"
                size = _checked_size(fd, self._sizes[file], str(self.path / file), hint)
                mapping = self._mappings[file] = FileMapping(fd, size, self.path / file)
            return mapping

    def read_file_range(self, file: str, offset: int, num_bytes: int) -> bytes:
        """Bytes of a shard, read and not mapped. Errors as ``regular_file.read_range``."""
        with self._in_use():
            return read_range(self._fd(file), offset, num_bytes, str(self.path / file))

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keeps the files open meanwhile, whoever closes the bundle: a number of a file that was closed may
        soon be another file's. UsageError if it is closed.
        """
        with self._lock:
            self._check_open()
            self._num_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_users -= 1
                self._close_unused()

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError("the bundle is closed", where=str(self.path), hint="open it again")

    def _fd(self, file: str) -> int:
        fd = self._fds.get(file)
        if fd is None:
            raise FormatError("the bundle has no such file", where=f"{self.path}: {shown(file)}")
        return fd

    def asset(self, name: str) -> bytes:
        """A text file's contents. FormatError if there is none or it is not what the manifest says, or
        ChecksumError.
        """
        record = self._assets.get(name)
        if record is None:
            raise FormatError("the bundle has no such text file", where=f"{self.path}: {shown(name)}")
        where = str(self.path / record.file)
        return decompress_asset(self.read_asset_file(record), record.decompressed_bytes, where)

    def read_asset_file(self, record: AssetRecord) -> bytes:
        """An asset as it is stored, checked against the manifest's size and digest."""
        path = self.path / record.file
        with self._in_use():
            packed = read_small_file(path, MAX_ASSET_BYTES, follow_links=False, dir_fd=self._directory)
        if not packed.startswith(ZSTD_MAGIC):
            refuse_text(packed, path)
        if len(packed) != record.num_bytes:
            raise FormatError(
                "text file has another size than the manifest says",
                where=str(path),
                got=f"{len(packed)} bytes",
                limit=f"{record.num_bytes} bytes",
            )
        if xxhash.xxh3_128_hexdigest(packed) != record.xxh3_128:
            raise ChecksumError("text file was altered", where=str(path), hint="get this file again")
        return packed

    def prefault(self, tier: str, num_threads: int) -> int:
        """Brings all blobs of a tier into memory with several threads; returns the bytes. ResourceError if
        unreadable.
        """
        ranges = []
        mappings = []  # kept until all is read, whoever closes the bundle meanwhile
        for blob in self.manifest.blobs:
            if blob.tier == tier:
                mappings.append(mapping := self._mapping(blob.file))
                ranges += list(_pieces(mapping.address + blob.offset_bytes, blob.num_bytes))
        with ThreadPoolExecutor(max(1, num_threads)) as pool:
            for _ in pool.map(lambda piece: prefault(*piece), ranges):
                pass
        return sum(num_bytes for _, num_bytes in ranges)

    def drop_cached(self, files: Iterable[str]) -> None:
        """Gives shards' pages in the page cache back to the system: they are read from the disk when they
        are used again, and lie in memory as that reading puts them.

        What is mapped and in use stays, here or in another process; so does a file that lives in RAM. Raises
        ResourceError if what was written to a shard cannot be brought to the disk first.
        """
        for file in files:
            with self._in_use(), io_errors("writing a shard to disk", self.path / file):
                fd = self._fd(file)
                os.fsync(fd)  # pages not yet written could not be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def changed_files(self) -> list[str]:
        """Shards that were written to since they were opened: what was read of them may be anything."""
        return [
            name
            for name, fd in self._fds.items()
            if (now := FileState.of(os.fstat(fd))).modified_ns != self._states[name].modified_ns
            or now.num_bytes != self._states[name].num_bytes
        ]

    def entries(self) -> list[str]:
        """Names of everything in the bundle's directory, sorted."""
        with self._in_use():
            return sorted(os.listdir(self._directory))  # noqa: PTH208 -- of the directory that was opened

    def close(self) -> None:
        """Closes the files. Views that were made stay valid, new ones are refused. Calling it again does
        nothing.
        """
        with self._lock:
            self._is_closed = True
            self._mappings.clear()
            self._close_unused()

    def _close_unused(self) -> None:
        """Closes the files of a closed bundle once nobody reads them any more."""
        if not self._is_closed or self._num_users:
            return
        while self._fds:
            os.close(self._fds.popitem()[1])
        if self._directory >= 0:
            directory, self._directory = self._directory, -1
            os.close(directory)

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_directory(path: Path) -> int:
    if path.name.endswith(PARTIAL_SUFFIX):
        raise FormatError(_NOT_FINISHED, where=str(path))
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.exists() and path.with_name(path.name + PARTIAL_SUFFIX).is_dir():
            raise FormatError(_NOT_FINISHED, where=str(path)) from error
        if path.exists():
            raise explain_file(path) from error
        raise FormatError(
            "there is no such bundle",
            where=str(path),
            hint="a bundle is the directory that krasis-convert wrote",
        ) from error
    except OSError as error:
        raise ResourceError("bundle cannot be opened", where=str(path), got=error.strerror) from error


def _checked_size(fd: int, num_bytes: int, where: str, hint: str) -> int:
    """The size of an open shard. FormatError if it is not ``num_bytes``."""
    size = os.fstat(fd).st_size
    if size != num_bytes:
        raise FormatError(
            "shard has another size than the manifest says",
            where=where,
            got=f"{size} bytes",
            limit=f"{num_bytes} bytes",
            hint=hint,
        )
    return size


def _match_shard(header: Header, blobs: dict[str, BlobRecord], where: str) -> tuple[TensorInfo, ...]:
    """The fillers of a shard, after checking that all its other tensors are exactly the manifest's blobs."""
    fillers = []
    for name, info in header.tensors.items():
        blob = blobs.get(name)
        if blob is None:
            if not name.startswith(FILLER_PREFIX) or info.dtype != "U8":
                raise FormatError(
                    "shard has a tensor that the manifest does not list", where=f"{where}: {shown(name)}"
                )
            fillers.append(info)
        elif (info.dtype, info.shape, info.offset_bytes) != (blob.dtype, blob.shape, blob.offset_bytes):
            raise FormatError(
                "shard and manifest disagree about a blob",
                where=f"{where}: {shown(name)}",
                got=f"{info.dtype} {list(info.shape)} at {info.offset_bytes}",
                limit=f"{blob.dtype} {list(blob.shape)} at {blob.offset_bytes}",
            )
    missing = sorted(blobs.keys() - header.tensors.keys())
    if missing:
        raise FormatError("shard lacks a blob that the manifest lists", where=f"{where}: {shown(missing[0])}")
    return tuple(fillers)


def _pieces(address: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most 64 MiB, so that threads share the work evenly."""
    for begin in range(0, num_bytes, _PREFAULT_BYTES):
        yield address + begin, min(_PREFAULT_BYTES, num_bytes - begin)
