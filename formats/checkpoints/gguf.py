"""Reads GGUF files, whole or split, without copying. The header's parser trusts nothing it reads.

Layout, all little-endian: magic ``GGUF``, u32 version, u64 tensors, u64 metadata pairs; the pairs; the
tensors' records; padding to the alignment; data. Sizes of a tensor are stored fastest first; here shapes are
row-major.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from krasis.formats.checkpoints.gguf_header import MAGIC, VERSIONS, GgufTensor, GgufValue, parse_gguf_header
from krasis.formats.checkpoints.tensor_file import Fetch, TensorFile, TensorFiles
from krasis.formats.errors import FormatError
from krasis.formats.files.file_kinds import read_head, refuse_other
from krasis.formats.files.regular_file import MappedFile, list_names, open_regular
from krasis.formats.names import shown

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_PARTS = 99_999
_MIN_FILE_BYTES = 24
_MOST_SHOWN = 4
_SEARCHED_BYTES = 4096  # behind the last tensor, for the next file's magic: more than any usual alignment
_VERSIONS = tuple(struct.pack("<I", version) for version in VERSIONS)


class GgufFile(TensorFile[GgufTensor]):
    """One GGUF file: metadata, tensors, views of their bytes."""

    __slots__ = ("metadata",)

    metadata: Mapping[str, GgufValue]

    @classmethod
    def open(cls, path: str | os.PathLike[str], fetch: Fetch | None = None) -> GgufFile:
        """Maps the file and checks its header. FormatError if it is not sound, ResourceError if the system
        refuses. fetch: brings what of the data is not there.
        """
        self = cls()
        self.path, self._fetch = Path(path), fetch
        fd = open_regular(self.path, follow_links=True)
        try:
            self.file_bytes = os.fstat(fd).st_size
            head = read_head(fd, str(self.path))
            if not head.startswith(MAGIC):
                refuse_other(head, self.path, "GGUF")
            if self.file_bytes < _MIN_FILE_BYTES:
                raise FormatError(
                    "file is too short for a GGUF header",
                    where=str(self.path),
                    got=f"{self.file_bytes} bytes",
                    limit=f">= {_MIN_FILE_BYTES}",
                    hint="the download may be incomplete",
                )
            self._mapping = MappedFile(fd, self.file_bytes, self.path)
        finally:
            os.close(fd)
        self.metadata, self.tensors = parse_gguf_header(self._mapping.bytes.data, str(self.path))
        self._refuse_joined()
        return self

    def _refuse_joined(self) -> None:
        """FormatError if another GGUF follows in the file: somebody joined what was to stay apart."""
        ends = [tensor.offset_bytes + tensor.num_bytes for tensor in self.tensors.values()]
        end = max(ends, default=self.file_bytes)
        rest = self._mapping.bytes[end : end + _SEARCHED_BYTES].tobytes()
        at = rest.find(MAGIC)
        if at < 0 or rest[at + 4 : at + 8] not in _VERSIONS:
            return
        is_split = self.metadata.get("split.count", 0) not in (0, 1)
        raise FormatError(
            "several GGUF files were joined into this one, which makes no whole",
            where=str(self.path),
            got=f"a second header at byte {end + at}",
            hint="keep the parts of a split GGUF as they were downloaded, in one folder, or join them with "
            "llama-gguf-split --merge"
            if is_split
            else "give one of the files as it was downloaded",
        )


class GgufCheckpoint(TensorFiles[GgufFile]):
    """A model in one GGUF file or in split parts, seen as one table of tensors. Metadata is that of the first
    part.
    """

    __slots__ = ("metadata", "tensors")

    metadata: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, path: str | os.PathLike[str], fetch: Fetch | None = None) -> GgufCheckpoint:
        """path: a GGUF file, any part of a split one, or a directory that holds exactly one of these.

        Raises FormatError for damage, a missing part (named), or parts that do not belong together.
        """
        self = cls()
        self.path = Path(path)
        paths = _part_paths(_find_file(self.path) if self.path.is_dir() else self.path)
        self.files = tuple(GgufFile.open(part, fetch) for part in paths)
        _check_parts(self.files)
        self._owner = {}
        for file in self.files:
            for name in file.tensors:
                if name in self._owner:
                    raise FormatError(
                        "two parts have the same tensor",
                        where=f"{file.path}: {shown(name)}",
                        got=f"also in {self._owner[name].path.name}",
                    )
                self._owner[name] = file
        self.metadata = self.files[0].metadata
        self.tensors = {name: file.tensors[name] for name, file in self._owner.items()}
        return self


def _find_file(directory: Path) -> Path:
    names = [name for name in list_names(directory) if name.endswith(".gguf")]
    models = {
        (match["stem"], match["count"]) if (match := _SPLIT_NAME.fullmatch(name)) else name for name in names
    }
    if len(models) == 1:
        return directory / names[0]
    raise FormatError(
        "directory has several GGUF models" if names else "directory has no GGUF file",
        where=str(directory),
        got=", ".join(names[:3]) or None,
        hint="name the file to read",
    )


def _part_paths(path: Path) -> list[Path]:
    """All parts of the model that ``path`` is a part of, in order."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count, number = int(match["count"]), int(match["number"])
    if not 1 <= number <= count <= _MAX_PARTS:
        raise FormatError("name says an impossible part", where=str(path), got=f"{number} of {count}")
    parts = [
        path.with_name(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)
    ]
    present = set(list_names(path.parent)) if path.parent.is_dir() else set()
    missing = [part.name for part in parts if part.name not in present]
    if missing:
        listed = ", ".join(shown(name) for name in missing[:_MOST_SHOWN])
        more = f" and {len(missing) - _MOST_SHOWN} more" if len(missing) > _MOST_SHOWN else ""
        raise FormatError(
            f"part {listed} is missing" if len(missing) == 1 else f"parts {listed}{more} are missing",
            where=str(path.parent),
            got=f"{count - len(missing)} of {count} parts",
            hint="the download may be incomplete",
        )
    return parts


def _check_parts(files: tuple[GgufFile, ...]) -> None:
    """The parts' own numbering agrees with their names."""
    for number, file in enumerate(files):
        count = file.metadata.get("split.count", 0)
        expected = len(files) if len(files) > 1 else count if count in (0, 1) else 1
        if count != expected or (len(files) > 1 and file.metadata.get("split.no") != number):
            raise FormatError(
                "file is not the part that its name says",
                where=str(file.path),
                got=f"part {shown(file.metadata.get('split.no'))} of {shown(count)}, counted from 0",
                limit=f"part {number} of {len(files)}",
                hint="keep the parts' original names, ...-00001-of-000NN.gguf, in one directory",
            )
    total = files[0].metadata.get("split.tensors.count")
    found = sum(len(file.tensors) for file in files)
    if len(files) > 1 and total is not None and total != found:
        raise FormatError(
            "parts have another number of tensors than the first says",
            where=str(files[0].path),
            got=found,
            limit=shown(total),
        )
