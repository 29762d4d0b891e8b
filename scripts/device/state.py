"""Which stages are done: one JSON file, written after each stage, keyed by stage and the sources it depends
on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from scripts.bench.shown import without_places
from scripts.device.context import REPOSITORY, Context

Status = Literal["done", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What came of a stage. digest: of its sources and sizes. error: why it failed or was skipped."""

    stage: str
    status: Status
    digest: str
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class State:
    """All entries, by stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        if path.is_file():
            self.merge(path)

    def merge(self, path: Path) -> None:
        """Takes the entries of another state file; those that are there stay."""
        for record in json.loads(path.read_text("utf-8"))["stages"]:
            entry = Entry(**record)
            self.entries.setdefault(entry.stage, entry)

    def is_done(self, stage: str, digest: str) -> bool:
        """Whether the stage succeeded with the same sources and sizes."""
        entry = self.entries.get(stage)
        return entry is not None and entry.status == "done" and entry.digest == digest

    def put(self, entry: Entry) -> None:
        """Replaces a stage's entry and writes the file."""
        self.entries[entry.stage] = entry
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", "utf-8")
        os.replace(temporary, self.path)  # noqa: PTH105

    def to_json(self) -> dict[str, Any]:
        """The file's contents, which are published: without the places of this machine."""
        return {"stages": [_shown(asdict(entry)) for entry in self.entries.values()]}


def _shown(value: Any) -> Any:
    """A value for JSON, its texts without places."""
    if isinstance(value, dict):
        return {key: _shown(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value]
    return without_places(value) if isinstance(value, str) else value


def source_digest(patterns: Iterable[str], context: Context) -> str:
    """The digest of the files below some paths of the repository, and of the sizes."""
    found = hashlib.blake2b(f"{context.device} {context.size} {context.sizes}".encode(), digest_size=16)
    for path in sorted(file for pattern in patterns for file in _files(REPOSITORY / pattern)):
        found.update(f"{path.relative_to(REPOSITORY)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


def _files(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    return [one for one in path.rglob("*") if one.is_file() and "__pycache__" not in one.parts]
