"""The unfinished bundle beside the output: its lock, its journal, and whether a run may continue it."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krasis.convert.journal import Journal, UnitRecord, read_journal
from krasis.formats.bundle.publish import remove_bundle
from krasis.formats.bundle.shard_output import OutputIo
from krasis.formats.bundle.shard_plan import ShardPlan
from krasis.formats.bundle.writer import PARTIAL_SUFFIX, BundleWriter
from krasis.formats.errors import MismatchError, ResourceError, UsageError
from krasis.formats.files.file_ops import FileOps, io_errors

_log = logging.getLogger(__name__)
LOCK_PATIENCE_S = 0.5


def partial_path(out: Path) -> Path:
    """The folder in which the bundle grows."""
    return out.with_name(out.name + PARTIAL_SUFFIX)


def is_resumable(out: Path) -> bool:
    """Whether an earlier run left a sound journal."""
    try:
        return partial_path(out).is_dir() and read_journal(partial_path(out))[0] is not None
    except MismatchError:
        return False


@dataclass(frozen=True, slots=True)
class Partial:
    """A locked partial bundle, open for writing. finished: what an earlier run completed, by unit name."""

    writer: BundleWriter
    journal: Journal
    finished: dict[str, UnitRecord]


@contextmanager
def open_partial(
    out: Path,
    shards: ShardPlan,
    fingerprint: Mapping[str, Any],
    io: FileOps,
    *,
    restart: bool,
    output_io: OutputIo = "auto",
) -> Iterator[Partial]:
    """Continues a matching partial bundle, or begins one; holds its lock meanwhile.

    Raises MismatchError when the earlier run had other inputs or settings, UsageError when something else
    lies there, ResourceError when another conversion holds it or the disk is full.
    """
    folder = partial_path(out)
    locks: list[int] = []
    with ExitStack() as stack:
        stack.callback(_close_all, locks)  # first in, so last out
        writer = stack.enter_context(BundleWriter(folder, shards, io=io, output_io=output_io))
        # The parent's lock covers the moment in which the folder exists but is not locked yet.
        with _parent_lock(folder.parent):
            units = _resume(folder, fingerprint, io, locks, restart=restart)
            if units is None:
                writer.create()
                locks.append(lock_folder(folder))
                journal = stack.enter_context(Journal(folder, io, 0))
                journal.append_header(fingerprint)
            else:
                writer.reopen()
                journal = stack.enter_context(Journal(folder, io, units[1]))
        finished = {} if units is None else {unit.unit: unit for unit in units[0]}
        yield Partial(writer, journal, finished)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _resume(
    folder: Path, fingerprint: Mapping[str, Any], io: FileOps, locks: list[int], *, restart: bool
) -> tuple[list[UnitRecord], int] | None:
    """Finished units and the journal's sound bytes; None (and nothing left there) to begin a new bundle."""
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(
            "this is in the way of the unfinished bundle", where=str(folder), hint="move it away"
        )
    locks.append(lock_folder(folder))
    header, units, sound_bytes = (None, [], 0) if restart else read_journal(folder)
    if header is not None:
        difference = describe_difference(header["fingerprint"], fingerprint)
        if difference is not None:
            raise MismatchError(
                f"an unfinished conversion is there, but {difference}",
                where=str(folder),
                hint="--restart begins anew; the same inputs and settings continue it",
            )
        return units, sound_bytes
    # Killed before anything was finished, or not wanted. Refuses to touch a folder that holds anything else.
    remove_bundle(folder, io=io)
    return None


@contextmanager
def _parent_lock(parent: Path) -> Iterator[None]:
    """Held for a moment only; waits for other conversions that begin in the same folder."""
    with io_errors("opening the folder", parent):
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _flock(fd, parent, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def lock_folder(folder: Path) -> int:
    """An exclusive lock on the folder itself: it needs no file of its own and dies with the process."""
    with io_errors("opening the unfinished bundle", folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock_soon(fd, folder)
        if not folder.exists() or not os.path.samestat(os.fstat(fd), folder.stat()):
            raise ResourceError(
                "another conversion has just finished here", where=str(folder), hint="try again"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock_soon(fd: int, folder: Path) -> None:
    """A child that a killed conversion had just begun has its lock until it runs a program of its own."""
    end = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            return _flock(fd, folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ResourceError:
            if time.monotonic() > end:
                raise
        time.sleep(LOCK_PATIENCE_S / 20)


def _flock(fd: int, folder: Path, operation: int) -> None:
    try:
        fcntl.flock(fd, operation)
    except BlockingIOError:
        raise ResourceError("another conversion is writing here", where=str(folder)) from None
    except OSError as error:  # some network file systems cannot lock folders
        _log.warning("%s cannot be locked (%s): do not convert twice into it at once", folder, error.strerror)


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first difference between two fingerprints as half a sentence, or None.

    before: from a journal, so of any JSON types; it must equal ``now`` to the last field.
    """
    try:
        return _difference(before, now)
    except (AttributeError, KeyError, TypeError, IndexError):
        return "its journal was begun by another version of this program"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for key in ("tool_version", "recipe", "sources", "assets", "plan"):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "tool_version":
            return f"it was begun by version {old}, this is {new}"
        if key == "recipe":
            return _changed_settings(old or {}, new or {})
        if key == "sources":
            return _changed_sources(old or {}, new or {})
        if key == "assets":
            names = _changed_keys(old or {}, new or {})
            return f"the text file {names[0]} has changed"
        return "the layout of its files would be another one"
    return None if dict(before) == dict(now) else "it was begun by another version of this program"


def _changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    def show(value: object) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    changes = [
        f"{key.replace('_', ' ')} was {show(old.get(key))} and is now {show(new.get(key))}"
        for key in _changed_keys(old, new)
    ]
    return "; ".join(changes)


def _changed_sources(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for kind in _changed_keys(old, new):
        if kind not in old:
            return f"it was begun without a {_KINDS.get(kind, kind)}"
        if kind not in new:
            return f"it was begun with a {_KINDS.get(kind, kind)} too"
        before, after = _by_name(old[kind]), _by_name(new[kind])
        name = _changed_keys(before, after)[0]
        if name not in before or name not in after:
            return (
                f"the source file {name} was {'not there' if name not in before else 'there'} when it began"
            )
        what = _changed_keys(before[name], after[name])
        words = {"num_bytes": "size", "mtime_ns": "time stamp", "header_digest": "header"}
        return f"the source file {name} has changed ({', '.join(words.get(w, w) for w in what)})"
    return "the sources have changed"


_KINDS = {"hf": "Hugging Face checkpoint", "gguf": "GGUF"}


def _by_name(files: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {str(file["name"]): file for file in files}
