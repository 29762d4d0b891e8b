"""Reads safetensors files and sharded checkpoints without copying: headers are checked in full, data is
mapped.

The header: 8 bytes little-endian length, then that many bytes of JSON, then the data; offsets count from
there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.checkpoints.tensor_file import Fetch, TensorFile, TensorFiles
from krasis.formats.dtypes import ITEM_BYTES, NUMPY_DTYPES
from krasis.formats.errors import FormatError
from krasis.formats.files.file_kinds import read_head, refuse_other
from krasis.formats.files.regular_file import (
    MappedFile,
    open_regular,
    read_range,
)
from krasis.formats.limits import (
    MAX_HEADER_BYTES,
    MAX_RANK,
    MAX_TENSORS,
    checked_mul,
)
from krasis.formats.names import check_tensor_name, shown
from krasis.formats.strict_json import parse_json_object

LENGTH_BYTES = 8
_METADATA_KEY = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_HEADER_DEPTH = 4
_TRAILING = "file goes on after its last tensor"
_COMPARED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a file. offset_bytes counts from the start of the file, shape is row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. header_bytes counts everything before the data, the length field included."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header_bytes: int


def read_header_bytes(fd: int, file_bytes: int, where: str) -> bytes:
    """The length field and the JSON of an open file, bounded before anything is read."""
    if file_bytes < LENGTH_BYTES:
        raise FormatError(
            "file is too short for a safetensors header",
            where=where,
            got=f"{file_bytes} bytes",
            limit=f">= {LENGTH_BYTES}",
            hint="the download may be incomplete",
        )
    json_bytes = int.from_bytes(read_range(fd, 0, LENGTH_BYTES, where), "little")
    if json_bytes > MAX_HEADER_BYTES:
        raise FormatError(
            "header is too long",
            where=where,
            got=f"{json_bytes} bytes",
            limit=f"{MAX_HEADER_BYTES} bytes",
            hint="this may not be a safetensors file",
        )
    if LENGTH_BYTES + json_bytes > file_bytes:
        raise FormatError(
            "file ends inside its header",
            where=where,
            got=f"{file_bytes} bytes",
            limit=f"{LENGTH_BYTES + json_bytes} needed",
            hint="the download may be incomplete",
        )
    return read_range(fd, 0, LENGTH_BYTES + json_bytes, where)


def parse_header(header: bytes, file_bytes: int, where: str) -> Header:
    """Checks a header (length field and JSON) against the file's size.

    Every byte after the header must belong to exactly one tensor. Raises FormatError naming the tensor.
    """
    if not header.startswith(b"{", LENGTH_BYTES):
        raise FormatError("header must begin with '{'", where=where, got=ascii(header[LENGTH_BYTES:][:8]))
    entries = parse_json_object(
        memoryview(header)[LENGTH_BYTES:], where, max_bytes=MAX_HEADER_BYTES, max_depth=_HEADER_DEPTH
    )
    metadata = _metadata(entries.pop(_METADATA_KEY, {}), where)
    if len(entries) > MAX_TENSORS:
        raise FormatError("too many tensors", where=where, got=len(entries), limit=MAX_TENSORS)
    tensors = {name: _entry(name, entry, len(header), where) for name, entry in entries.items()}
    _check_coverage(tensors, len(header), file_bytes, where)
    return Header(tensors, metadata, len(header))


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(
            "metadata must map text to text", where=f"{where}: {_METADATA_KEY}", got=shown(value)
        )
    return value


def _entry(name: str, entry: Any, header_bytes: int, where: str) -> TensorInfo:
    check_tensor_name(name, where)
    where = f"{where}: {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise FormatError(
            "tensor entry has other keys", where=where, got=shown(got), limit=", ".join(sorted(_ENTRY_KEYS))
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        from krasis.formats.checkpoints.quantised_checkpoint import type_hint

        packed = isinstance(dtype, str) and dtype.startswith(("F4", "F6", "F8"))
        raise FormatError(
            "unknown dtype",
            where=where,
            got=shown(dtype),
            limit=", ".join(ITEM_BYTES),
            hint=type_hint(dtype) if packed else "",
        )
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise FormatError(
            "shape is not a short list of sizes", where=where, got=shown(shape), limit=f"rank {MAX_RANK}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError("data_offsets must be two sizes", where=where, got=shown(offsets))
    begin, end = offsets
    num_bytes = checked_mul([*shape, ITEM_BYTES[dtype]], where)
    if end - begin != num_bytes:
        raise FormatError(
            "data_offsets do not fit the shape",
            where=where,
            got=f"{end} - {begin} bytes",
            limit=f"{num_bytes} bytes",
        )
    return TensorInfo(name, dtype, tuple(shape), header_bytes + begin, num_bytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(tensors: dict[str, TensorInfo], header_bytes: int, file_bytes: int, where: str) -> None:
    """Tensors lie end to end, from the header to the end of the file."""
    position = header_bytes
    # The end first: a file that is merely cut short should say so, not complain about some tensor.
    needed = max((info.offset_bytes + info.num_bytes for info in tensors.values()), default=header_bytes)
    if needed > file_bytes:
        raise FormatError(
            f"file ends at {file_bytes}, its header needs {needed}",
            where=where,
            got=f"{file_bytes} bytes",
            limit=f"{needed} bytes",
            hint="the download may be incomplete",
        )
    for info in sorted(tensors.values(), key=lambda info: (info.offset_bytes, info.num_bytes)):
        if info.offset_bytes != position:
            what = "tensors overlap" if info.offset_bytes < position else "there is a hole before a tensor"
            raise FormatError(
                what,
                where=f"{where}: {shown(info.name)}",
                got=f"offset {info.offset_bytes}",
                limit=f"offset {position}",
            )
        position += info.num_bytes
    if position != file_bytes:
        raise FormatError(_TRAILING, where=where, got=f"{file_bytes} bytes", limit=f"{position} bytes")


class SafetensorsFile(TensorFile[TensorInfo]):
    """One safetensors file: its tensors and views of their bytes."""

    __slots__ = ("header_bytes", "metadata")

    metadata: Mapping[str, str]
    header_bytes: int

    @classmethod
    def open(cls, path: str | os.PathLike[str], fetch: Fetch | None = None) -> SafetensorsFile:
        """Reads and checks the header and maps the file. FormatError if it is not sound, ResourceError if
        refused. fetch: brings what of the data is not there.
        """
        self = cls()
        self.path, self._fetch = Path(path), fetch
        fd = open_regular(self.path, follow_links=True)
        try:
            self.file_bytes = os.fstat(fd).st_size
            _refuse_other(fd, self.path)
            raw = read_header_bytes(fd, self.file_bytes, str(self.path))
            try:
                header = parse_header(raw, self.file_bytes, str(self.path))
            except FormatError as error:
                if error.what == _TRAILING:
                    _refuse_joined(fd, raw, self.path)
                raise
            self._mapping = MappedFile(fd, self.file_bytes, self.path)
        finally:
            os.close(fd)
        self.tensors, self.metadata, self.header_bytes = header.tensors, header.metadata, header.header_bytes
        return self

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """A view of the tensor in its shape and NumPy type (BF16 as uint16). FormatError for types NumPy
        lacks.
        """
        info = self.info(name)
        dtype = NUMPY_DTYPES.get(info.dtype)
        if dtype is None:
            raise FormatError("dtype has no NumPy form", where=f"{self.path}: {shown(name)}", got=info.dtype)
        # Checkpoints need not align tensors; NumPy handles an unaligned view.
        return self.view(name).view(dtype).reshape(info.shape)


class ShardedCheckpoint(TensorFiles[SafetensorsFile]):
    """A checkpoint of one or several safetensors files, seen as one table of tensors. notes: what of its
    folder was left alone, a sentence each.
    """

    __slots__ = ("metadata", "notes", "tensors")

    metadata: Mapping[str, str]
    notes: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | os.PathLike[str], fetch: Fetch | None = None) -> ShardedCheckpoint:
        """path: a ``.safetensors`` file, an index (``*.safetensors.index.json``), or a directory with either.

        Raises FormatError for a missing or truncated shard (named), an index that contradicts its shards, or
        damage.
        """
        self = cls()
        self.path = Path(path)
        # Checkpoints are opened by the converter alone; the runtime starts without these modules.
        from krasis.formats.checkpoints.shard_index import check_present, find_entry, read_index

        entry = find_entry(self.path)
        self.notes = entry.notes
        if entry.index is not None:
            weight_map = read_index(entry.index)
            names = sorted(set(weight_map.values()))
            check_present(entry.index.parent, names, f"that {entry.index.name} names")
            self.files = tuple(SafetensorsFile.open(entry.index.with_name(name), fetch) for name in names)
            self._owner = _match_index(weight_map, self.files, entry.index)
        else:
            self.files = tuple(SafetensorsFile.open(file, fetch) for file in entry.files)
            self._owner = _add_unlisted({}, self.files)
        self.tensors = {name: file.tensors[name] for name, file in self._owner.items()}
        self.metadata = self.files[0].metadata
        return self

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """The tensor in its shape and NumPy type; see ``SafetensorsFile.array``."""
        return self.file_of(name).array(name)


def _refuse_other(fd: int, path: Path) -> None:
    """FormatError if the file is something known that is no safetensors file."""
    head = read_head(fd, str(path))
    # A header's brace after its length: whatever is wrong with it is told by the parser.
    is_plausible = head[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and head[6:8] == b"\0\0"
    if not is_plausible:
        refuse_other(head, path, "safetensors")


def _refuse_joined(fd: int, header: bytes, path: Path) -> None:
    """FormatError if another safetensors file begins where this one, of a sound header, should end."""
    entries = parse_json_object(memoryview(header)[LENGTH_BYTES:], str(path), max_bytes=MAX_HEADER_BYTES)
    entries.pop(_METADATA_KEY, None)
    end = len(header) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    start = read_head(fd, str(path), end)
    if start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and start[6:8] == b"\0\0":
        raise FormatError(
            "several safetensors files were joined into this one, which makes no whole",
            where=str(path),
            got=f"a second header at byte {end}",
            hint="give the shards as they were downloaded, by their folder or their index file",
        )


def _match_index(
    weight_map: Mapping[str, str], files: tuple[SafetensorsFile, ...], index: Path
) -> dict[str, SafetensorsFile]:
    """tensor -> file. As transformers, which reads whole shards: a tensor may lie in another shard than the
    index says, or be missing in the index; in two shards it must be the same.
    """
    by_name = {file.path.name: file for file in files}
    owner: dict[str, SafetensorsFile] = {}
    for name, file_name in weight_map.items():
        holders = [by_name[file_name], *files]
        found = next((file for file in holders if name in file.tensors), None)
        if found is None:
            raise FormatError(
                "the index names a tensor that its shard does not have",
                where=f"{index}: {shown(name)}",
                got=file_name,
                hint="index and shards may be of different versions",
            )
        owner[name] = found
    return _add_unlisted(owner, files)


def _add_unlisted(
    owner: dict[str, SafetensorsFile], files: tuple[SafetensorsFile, ...]
) -> dict[str, SafetensorsFile]:
    """The table with all that the files hold. FormatError for a tensor with two contents."""
    for file in files:
        for name in file.tensors:
            first = owner.setdefault(name, file)
            if first is not file and not _is_same(name, first, file):
                raise FormatError(
                    "two shards hold a tensor of the same name and different contents",
                    where=f"{file.path}: {shown(name)}",
                    got=f"another in {first.path.name}",
                    hint="the shards may be of different versions: get all of them again",
                )
    return owner


def _is_same(name: str, one: SafetensorsFile, other: SafetensorsFile) -> bool:
    first, second = one.info(name), other.info(name)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    left, right = one.view(name), other.view(name)
    starts = range(0, left.nbytes, _COMPARED_BYTES)
    return all(
        np.array_equal(left[at : at + _COMPARED_BYTES], right[at : at + _COMPARED_BYTES]) for at in starts
    )
