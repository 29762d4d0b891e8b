"""Conversions in this process, and what they leave."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import xxhash

from krasis.convert.conversion import Summary, convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.files.file_ops import FileOps


@dataclass(frozen=True)
class Bundle:
    """A converted bundle with its summary."""

    path: Path
    summary: Summary
    messages: str

    def files(self) -> dict[str, str]:
        """Name to digest of every file."""
        return tree_digests(self.path)


def tree_digests(folder: Path) -> dict[str, str]:
    """Name to digest of every file in a folder."""
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in sorted(folder.iterdir())}


def run_conversion(
    paths: list[Path], out: Path, io: FileOps | None = None, verbosity: int = 0, **settings: Any
) -> Bundle:
    """Prepares and converts in this process."""
    stream = StringIO()
    reporter = Reporter(verbosity, stream)
    prepared = prepare(paths, out, ConvertSettings(**settings), reporter)
    return Bundle(out, convert(prepared, reporter, io), stream.getvalue())
