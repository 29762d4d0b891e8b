"""The folder beside the output in which parts of sources lie while they are needed.

Files have their whole size and take only the place of what is there. ``parts.jsonl`` says what is: a header
of the models' commits, then a line a part that came or went, written like a conversion's journal. A part's
line is appended after its bytes are on the disk, that of one that goes before they are freed, so that the log
is true however the program ends; what it does not know of is freed when it is opened.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krasis.convert.hub.spans import Spans
from krasis.convert.journal import decode_lines, encode_line
from krasis.convert.partial import lock_folder
from krasis.formats.errors import FormatError, ResourceError, UsageError
from krasis.formats.files.file_ops import FileOps, io_errors, write_all
from krasis.formats.files.regular_file import read_small_file

SOURCES_SUFFIX = ".sources"
LOG_NAME = "parts.jsonl"
_VERSION = 1
_MAX_LOG_BYTES = 256 << 20
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_libc = ctypes.CDLL(None, use_errno=True)


def sources_path(out: Path) -> Path:
    """The folder of an output's sources."""
    return out.with_name(out.name + SOURCES_SUFFIX)


class StoredFile:
    """A file of which parts are there. present: which."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes
        self.present = Spans()
        with io_errors("making room for a source", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self.fd = os.open(path, flags, 0o644)
            os.ftruncate(self.fd, num_bytes)

    def free(self, begin: int, end: int) -> None:
        """Gives the place of a part back. ResourceError where the file system cannot."""
        call = _libc.fallocate
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if call(self.fd, _KEEP_SIZE | _PUNCH_HOLE, begin, end - begin) == 0:
            return
        code = ctypes.get_errno()
        if code in _NO_HOLES:
            raise ResourceError(
                "this file system cannot free a part of a file, which --drop-sources needs",
                where=str(self.path),
                hint="choose another disk with -o, or convert without --drop-sources",
            )
        with io_errors("freeing a part of a source", self.path):
            raise OSError(code, os.strerror(code))


class SourceStore:
    """The folder, its lock and its log. header: what the parts are of; None to take what an earlier run
    began with, or nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100 -- links are not followed
        self.files: dict[Path, StoredFile] = {}
        self.is_new = not folder.exists()
        with io_errors("making the folder for sources", folder):
            folder.mkdir(exist_ok=True)
        self._lock_fd = lock_folder(folder)
        self._io = FileOps()
        self._log_fd = -1
        self._records, self._log_bytes = self._read_log()
        self._memos = {record["memo"]: record["value"] for record in self._records if "memo" in record}

    @property
    def header(self) -> dict[str, Any] | None:
        """What an earlier run began with, None if none did."""
        return self._records[0]["header"] if self._records else None

    def begin(self, header: Mapping[str, Any]) -> None:
        """Goes on with what is there of these sources, or begins anew."""
        if self.header != header:
            self.clear()
            self._append({"krasis_sources": _VERSION, "header": dict(header)})

    def add(self, name: str, num_bytes: int) -> StoredFile:
        """A file of the header's, with the parts that are there. name: below the folder."""
        file = StoredFile(self.folder / name, num_bytes)
        self.files[file.path] = file
        for record in self._records[1:]:
            if record.get("file") == name:
                span = (int(record["begin"]), int(record["end"]))
                came = record["is"] == "there"
                file.present = file.present.union([span]) if came else file.present.without([span])
        file.present = file.present.within(0, num_bytes)
        for begin, end in Spans([(0, num_bytes)]).without(file.present):
            file.free(begin, end)
        return file

    def keep(self, file: StoredFile, begin: int, end: int) -> None:
        """A part is there from now on: its bytes are on the disk."""
        self._note(file, begin, end, "there")
        file.present = file.present.union([(begin, end)])

    def drop(self, file: StoredFile, begin: int, end: int) -> None:
        """A part is not needed any more."""
        file.present = file.present.without([(begin, end)])
        self._note(file, begin, end, "gone")
        file.free(begin, end)

    def _note(self, file: StoredFile, begin: int, end: int, what: str) -> None:
        name = str(file.path.relative_to(self.folder))
        self._append({"file": name, "begin": begin, "end": end, "is": what})

    def recall(self, memo: str) -> Any:
        """What an earlier run remembered under that name, None if nothing."""
        return self._memos.get(memo)

    def remember(self, memo: str, value: Any) -> None:
        """Keeps a JSON value for runs that go on."""
        self._memos[memo] = value
        self._append({"memo": memo, "value": value})

    def allocated_bytes(self) -> int:
        """What the sources take on the disk."""
        return sum(os.fstat(file.fd).st_blocks * 512 for file in self.files.values())

    def _read_log(self) -> tuple[list[dict[str, Any]], int]:
        path = self.folder / LOG_NAME
        if not os.path.lexists(path):
            if any(self.folder.iterdir()) and not self.is_new:
                raise UsageError(
                    "this is in the way of the sources", where=str(self.folder), hint="move it away"
                )
            return [], 0
        try:
            records, sound = decode_lines(read_small_file(path, _MAX_LOG_BYTES, follow_links=False))
        except FormatError:
            return [], 0
        if not records or records[0].get("krasis_sources") != _VERSION:
            return [], 0
        return (records, sound) if all(map(_is_sound, records)) else ([], 0)

    def _append(self, record: Mapping[str, Any]) -> None:
        path = self.folder / LOG_NAME
        with io_errors("writing the list of sources", path):
            if self._log_fd < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._log_fd = os.open(path, flags, 0o644)
                os.ftruncate(self._log_fd, self._log_bytes)
            line = encode_line(record)
            write_all(self._io, self._log_fd, line, self._log_bytes)
            os.fdatasync(self._log_fd)
        self._log_bytes += len(line)

    def clear(self) -> None:
        """Forgets and removes everything; the folder stays. What is forgotten first: a log must not outlive
        the parts that it lists.
        """
        for file in self.files.values():
            os.close(file.fd)
        log = self.folder / LOG_NAME
        with io_errors("removing sources", self.folder):
            if self._log_fd < 0 and os.path.lexists(log):
                self._log_fd = os.open(log, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if self._log_fd >= 0:
                os.ftruncate(self._log_fd, 0)
                os.fsync(self._log_fd)
                os.close(self._log_fd)
            self.files, self._records, self._memos = {}, [], {}
            self._log_fd, self._log_bytes = -1, 0
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == LOG_NAME):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def remove(self) -> None:
        """Removes the folder."""
        self.clear()
        with io_errors("removing the folder for sources", self.folder):
            self.folder.rmdir()
        self.close()

    def close(self) -> None:
        """Lets go of everything; the parts stay for a run that goes on."""
        for file in self.files.values():
            os.close(file.fd)
        for fd in (self._log_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self.files, self._log_fd, self._lock_fd = {}, -1, -1


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Each line has a checksum; this is about logs of other versions."""
    if "header" in record:
        return isinstance(record["header"], dict)
    if "memo" in record:
        return isinstance(record["memo"], str) and "value" in record
    return (
        isinstance(record.get("file"), str)
        and record.get("is") in ("there", "gone")
        and all(type(record.get(key)) is int for key in ("begin", "end"))
    )
