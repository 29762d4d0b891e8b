"""The last step of a conversion: ``X.partial`` becomes ``X`` in one rename, or takes the place of an older
bundle.

Whatever happens in between, ``X`` is the old bundle, the new one, or (only on file systems that cannot
exchange names) for a moment absent, with the old one beside it.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from krasis.formats.bundle.manifest import MANIFEST_NAME
from krasis.formats.bundle.manifest_records import ASSET_SUFFIX
from krasis.formats.errors import UsageError
from krasis.formats.files.file_ops import PARTIAL_SUFFIX, FileOps, io_errors, sync_directory

REPLACED_SUFFIX = ".replaced"

# Names that a conversion, the file system or a desktop may leave in the directory; readers ignore them.
SCRATCH_PREFIXES = ("journal.", ".")

_log = logging.getLogger(__name__)
_BUNDLE_FILE = re.compile(r"(dense|gpu|cpu)-\d{3,6}\.safetensors|.+" + re.escape(ASSET_SUFFIX))


def publish(
    partial: Path, final: Path, *, replace: bool, scratch: Iterable[str] = (), io: FileOps | None = None
) -> None:
    """Renames a finished partial directory (its manifest written and synced) to its final name.

    scratch: files of the conversion itself inside ``partial`` (a journal), removed once the new name is
    durable. replace: an older bundle at ``final`` is exchanged with the new one atomically, then removed.
    Raises UsageError if something is there that may not be replaced, ResourceError if the system refuses.
    """
    io = io or FileOps()
    parent = partial.absolute().parent
    is_old = os.path.lexists(final)
    if is_old:
        check_replaceable(final, replace=replace)
    with io_errors("renaming the finished bundle", final):
        if not is_old:
            io.rename_noreplace(partial, final)
        elif not io.rename_exchange(partial, final):
            partial = _rename_twice(partial, final, io)
    sync_directory(parent, io)
    for name in scratch:
        with io_errors("removing a scratch file", final / name):
            if (final / name).exists():
                io.unlink(final / name)
    if is_old:
        remove_bundle(partial, io=io)
        sync_directory(parent, io)


def _rename_twice(partial: Path, final: Path, io: FileOps) -> Path:
    """The exchange of a file system that has none. Returns where the old bundle is now."""
    aside = final.with_name(final.name + REPLACED_SUFFIX)
    _log.info("this file system cannot exchange names: the old bundle is moved to %s first", aside)
    if os.path.lexists(aside):
        remove_bundle(
            aside, io=io
        )  # left over from a replacement that was interrupted after its second rename
    io.rename_noreplace(final, aside)
    try:
        io.rename_noreplace(partial, final)
    except OSError:
        io.rename_noreplace(aside, final)
        raise
    return aside


def check_replaceable(path: Path, *, replace: bool) -> None:
    """UsageError unless ``replace`` is set and ``path`` is a directory that holds nothing but a bundle (or
    nothing).
    """
    where = str(path)
    if not replace:
        raise UsageError(
            "output exists already", where=where, hint="choose another name, or give --force to replace it"
        )
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise UsageError(
            "output is not a directory and is not touched", where=where, hint="choose another name"
        )
    foreign = _foreign_entries(path)
    if foreign:
        raise UsageError(
            "output directory holds other things than a bundle and is not touched",
            where=where,
            got=foreign[0],
            hint="choose another name, or remove them yourself",
        )


def remove_bundle(path: Path, *, io: FileOps | None = None) -> None:
    """Removes a bundle or partial bundle, manifest first, so that no half of it can be opened.

    Raises UsageError if the directory holds anything else, ResourceError if the system refuses.
    """
    io = io or FileOps()
    check_replaceable(path, replace=True)
    names = sorted((entry.name for entry in path.iterdir()), key=lambda name: (name != MANIFEST_NAME, name))
    with io_errors("removing the old bundle", path):
        for name in names:
            io.unlink(path / name)
        io.rmdir(path)


def _foreign_entries(path: Path) -> list[str]:
    """Entries that neither a bundle nor a conversion puts there."""
    names = sorted(entry.name for entry in path.iterdir())
    is_bundle = MANIFEST_NAME in names or path.name.endswith((PARTIAL_SUFFIX, REPLACED_SUFFIX))
    foreign = []
    for name in names:
        is_file = stat.S_ISREG((path / name).lstat().st_mode)
        is_ours = name.startswith((MANIFEST_NAME, *SCRATCH_PREFIXES)) or _BUNDLE_FILE.fullmatch(name)
        if not (is_bundle and is_file and is_ours):
            foreign.append(name)
    return foreign
