"""The record of finished work that makes a conversion resumable.

``journal.jsonl`` in the partial bundle: a header line, then a line a finished unit, each ``xxh3-64 SPACE json
LF``. A line is appended (and synced) only after the unit's bytes are on disk. A line that is torn or damaged
ends the journal: what it and later lines described is done again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from krasis.formats.errors import FormatError, MismatchError, ResourceError
from krasis.formats.files.file_ops import FileOps, io_errors, write_all
from krasis.formats.files.regular_file import read_small_file

JOURNAL_NAME = "journal.jsonl"  # readers of bundles ignore ``journal.*``
JOURNAL_VERSION = 1
_MAX_JOURNAL_BYTES = 256 << 20
_MAX_HEADER_BYTES = 64 << 20
_DIGEST = re.compile("[0-9a-f]{32}")


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
    """Header (None if none was ever written), finished units, and the journal's sound bytes.

    Raises MismatchError, with the way out, for a journal that cannot be followed: its header is damaged, it
    is of another version of this program, or no file of ours.
    """
    path = folder / JOURNAL_NAME
    if not os.path.lexists(path):
        return None, [], 0
    try:
        data = read_small_file(path, _MAX_JOURNAL_BYTES, follow_links=False)
    except FormatError as error:
        raise _unusable(path, f"cannot be used: {error.what}") from error
    records, sound_bytes = decode_lines(data)
    if not records:
        if b"\n" not in data[:_MAX_HEADER_BYTES]:
            return None, [], 0  # killed while the very first line was being written
        raise _unusable(path, "is damaged in its first line, which says what it is of")
    header = records[0]
    if header.get("krasis_journal") != JOURNAL_VERSION or not isinstance(header.get("fingerprint"), dict):
        raise _unusable(path, "was begun by another version of this program")
    units = [_unit_record(record) for record in records[1:]]
    if None in units or len({unit.unit for unit in units if unit}) < len(units):
        raise _unusable(path, "was begun by another version of this program")
    return header, [unit for unit in units if unit], sound_bytes


def _unusable(path: Path, what: str) -> MismatchError:
    return MismatchError(
        f"the journal of the unfinished conversion {what}",
        where=str(path),
        hint="--restart discards what was done and begins anew",
    )


def _unit_record(record: Mapping[str, Any]) -> UnitRecord | None:
    """A line as a record; None if it has other fields or types."""
    if set(record) != {"unit", "blobs", "tensors", "quality"} or not isinstance(record["unit"], str):
        return None
    for name in ("blobs", "tensors"):
        table = record[name]
        if not isinstance(table, dict) or not all(
            isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in table.values()
        ):
            return None
    return UnitRecord(**record) if isinstance(record["quality"], dict) else None


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
