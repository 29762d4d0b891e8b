"""The record of finished work that makes a conversion resumable.

``journal.jsonl`` in the partial bundle: a header line, then a line a finished unit, each ``xxh3-64 SPACE json
LF``. A line is appended (and synced) only after the unit's bytes are on disk. A line that is torn or damaged
ends the journal: what it and later lines described is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from krasis.formats.errors import MismatchError, ResourceError
from krasis.formats.file_ops import FileOps, io_errors, write_all
from krasis.formats.regular_file import read_small_file

JOURNAL_NAME = "journal.jsonl"  # readers of bundles ignore ``journal.*``
JOURNAL_VERSION = 1
_MAX_JOURNAL_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """A finished unit: digests of its blobs and of the source tensors first read for it, and its errors."""

    unit: str
    blobs: dict[str, str]
    tensors: dict[str, str]
    quality: dict[str, Any]


def encode_line(record: Mapping[str, Any]) -> bytes:
    """One journal line."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def decode_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The sound lines at the beginning of a journal, and the bytes they span."""
    records: list[dict[str, Any]] = []
    position = 0
    while (end := data.find(b"\n", position)) >= 0:
        check, _, text = data[position:end].partition(b" ")
        if check != xxhash.xxh3_64_hexdigest(text).encode():
            break
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
        position = end + 1
    return records, position


def read_journal(folder: Path) -> tuple[dict[str, Any] | None, list[UnitRecord], int]:
    """Header (None if there is no sound one), finished units, and the journal's sound bytes."""
    path = folder / JOURNAL_NAME
    if not os.path.lexists(path):
        return None, [], 0
    data = read_small_file(path, _MAX_JOURNAL_BYTES, follow_links=False)
    records, sound_bytes = decode_lines(data)
    if not records or records[0].get("krasis_journal") != JOURNAL_VERSION:
        return None, [], 0
    try:
        units = [UnitRecord(**record) for record in records[1:]]
    except TypeError as error:
        raise MismatchError(
            "the unfinished conversion was begun by another version of this program",
            where=str(path),
            hint="--restart begins anew",
        ) from error
    return records[0], units, sound_bytes


class Journal:
    """Appends records durably to the journal in ``folder``; first cuts off what is beyond ``sound_bytes``."""

    def __init__(self, folder: Path, io: FileOps, sound_bytes: int) -> None:
        self._io = io
        self._path = folder / JOURNAL_NAME
        self._position = sound_bytes
        with io_errors("opening the journal", self._path):
            self._fd = io.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            with io_errors("opening the journal", self._path):
                io.ftruncate(self._fd, sound_bytes)
        except ResourceError:
            io.close(self._fd)
            raise

    def append_header(self, fingerprint: Mapping[str, Any]) -> None:
        """The first line: what a resume must find unchanged."""
        self._append(encode_line({"krasis_journal": JOURNAL_VERSION, "fingerprint": dict(fingerprint)}))

    def append(self, record: UnitRecord) -> None:
        """A finished unit. Its data must be on disk before this is called."""
        self._append(encode_line(asdict(record)))

    def _append(self, line: bytes) -> None:
        with io_errors("writing the journal", self._path):
            write_all(self._io, self._fd, line, self._position)
            self._io.fdatasync(self._fd)
        self._position += len(line)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the journal stays."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with io_errors("closing the journal", self._path):
                self._io.close(fd)
