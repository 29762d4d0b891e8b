"""What a folder's files were when somebody looked, to tell later whether they are still the same."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

# Kernels stamp files by a clock that ticks every 1 to 10 ms: what is written in the tick of an earlier write
# gets no new stamp, so a look at files that young would not notice the next write.
_TICK_S = 0.02


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes when a file is written, cut, replaced or renamed, in its inode.

    changed_ns: its ctime, which no program can set back.
    """

    device: int
    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """The state that stat(2) reports of a file."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def difference(self, later: FileState | None) -> str | None:
        """What happened to the file since, in words; None if nothing did. later: None if it is gone."""
        if later is None:
            return "was removed"
        if (self.device, self.inode) != (later.device, later.inode):
            return "was replaced"
        if self.num_bytes != later.num_bytes:
            return f"changed its size from {self.num_bytes} to {later.num_bytes} bytes"
        return None if self == later else "was written to"


@dataclass(frozen=True, slots=True)
class FolderSnapshot:
    """A folder and its entries. folder: device and inode, None if it could not be looked at; refusal says
    why, and is empty for a folder that is not there.
    """

    folder: tuple[int, int] | None
    files: dict[str, FileState]
    refusal: str = ""

    @classmethod
    def take(cls, path: Path) -> FolderSnapshot:
        """Looks at all entries; links are not followed. What cannot be looked at is left out."""
        try:
            status = path.stat()
            with os.scandir(path) as entries:
                names = [entry.name for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return cls(None, {})
        except OSError as error:
            return cls(None, {}, error.strerror or str(error))
        files = {}
        for name in names:
            try:
                files[name] = FileState.of((path / name).lstat())
            except OSError:  # removed in between, or not ours to see
                continue
        return cls((status.st_dev, status.st_ino), files)

    @classmethod
    def take_settled(cls, path: Path) -> FolderSnapshot:
        """Takes a snapshot as ``take`` does, of files that are old enough for any later write to show."""
        snapshot = cls.take(path)
        youngest_ns = max((one.changed_ns for one in snapshot.files.values()), default=0)
        if abs(time.time() - youngest_ns / 1e9) < _TICK_S:
            time.sleep(_TICK_S)
            return cls.take(path)
        return snapshot

    def differences(self, later: FolderSnapshot) -> dict[str, str]:
        """What happened to each file that was there, by name. Files that are new are not listed."""
        found = {}
        for name, state in self.files.items():
            if (what := state.difference(later.files.get(name))) is not None:
                found[name] = what
        return found
