"""What files of tensors have in common, whatever their format: records by name, and views of mapped bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from krasis.formats.errors import FormatError
from krasis.formats.files.regular_file import Bytes, MappedFile
from krasis.formats.names import shown

# Called with a file's path and a stretch of it (begin, end) before its bytes are read: files of which only
# parts are on the disk get them then.
Fetch = Callable[[Path, int, int], None]


class Placed(Protocol):
    """A tensor's record: where its bytes lie in its file."""

    @property
    def offset_bytes(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


InfoT = TypeVar("InfoT", bound=Placed)
FileT = TypeVar("FileT", bound="TensorFile[Any]")


class TensorFile(Generic[InfoT]):
    """One file: its tensors and views of their bytes. The views keep the mapping alive; there is nothing to
    close.
    """

    __slots__ = ("_fetch", "_mapping", "file_bytes", "path", "tensors")

    path: Path
    tensors: Mapping[str, InfoT]
    file_bytes: int
    _mapping: MappedFile
    _fetch: Fetch | None

    def info(self, name: str) -> InfoT:
        """A tensor's record. FormatError if there is none of that name."""
        info = self.tensors.get(name)
        if info is None:
            raise FormatError("tensor is missing", where=f"{self.path}: {shown(name)}")
        return info

    def view(self, name: str, begin: int = 0, end: int | None = None) -> Bytes:
        """uint8 [num_bytes], read-only, a view of the mapped file; or of the bytes from begin to end."""
        info = self.info(name)
        last = info.offset_bytes + (info.num_bytes if end is None else min(end, info.num_bytes))
        first = min(info.offset_bytes + begin, last)
        if self._fetch is not None:
            self._fetch(self.path, first, last)
        return self._mapping.bytes[first:last]

    def release(self, name: str) -> None:
        """Tells the system that the tensor's pages are not needed now; they are read again if touched."""
        info = self.info(name)
        self._mapping.release(info.offset_bytes, info.num_bytes)


class TensorFiles(Generic[FileT]):
    """A model in one or several files, seen as one table of tensors."""

    __slots__ = ("_owner", "files", "path")

    path: Path
    files: tuple[FileT, ...]
    _owner: dict[str, FileT]

    def file_of(self, name: str) -> FileT:
        """The file that holds a tensor. FormatError if there is none."""
        file = self._owner.get(name)
        if file is None:
            raise FormatError("tensor is missing", where=f"{self.path}: {shown(name)}")
        return file

    def view(self, name: str, begin: int = 0, end: int | None = None) -> Bytes:
        """uint8 [num_bytes], read-only, a view of the mapped file; or of the bytes from begin to end."""
        return self.file_of(name).view(name, begin, end)

    def release(self, name: str) -> None:
        """The tensor's pages are not needed now; see ``TensorFile.release``."""
        self.file_of(name).release(name)
