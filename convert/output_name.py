"""Which names a bundle may have: none that its own files need, or that no file system takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from krasis.convert.partial import partial_path
from krasis.formats.bundle.manifest import MANIFEST_NAME
from krasis.formats.bundle.publish import REPLACED_SUFFIX
from krasis.formats.errors import UsageError
from krasis.formats.files.file_ops import PARTIAL_SUFFIX

_SUFFIXES = (PARTIAL_SUFFIX, REPLACED_SUFFIX)
_USUAL_NAME_BYTES = 255


def check_name(out: Path) -> None:
    """UsageError for a name that readers take for an unfinished bundle, or that is too long."""
    if not out.name:
        raise UsageError("the output needs a name", got=str(out))
    suffix = next((one for one in _SUFFIXES if out.name.lower().endswith(one)), None)
    if suffix is not None:
        better = out.name[: -len(suffix)]
        raise UsageError(
            f"a bundle's name must not end in {suffix}: that marks unfinished and replaced ones",
            where=str(out),
            hint=f"use -o {out.with_name(better)}" if better else "choose another name",
        )
    limit = _name_limit(out.parent) - max(map(len, _SUFFIXES))
    if len(os.fsencode(out.name)) > limit:
        raise UsageError(
            "the output's name is too long",
            got=f"{len(os.fsencode(out.name))} bytes",
            limit=f"{limit} bytes",
            hint="choose a shorter name",
        )


def check_apart(out: Path, sources: Sequence[Path]) -> None:
    """UsageError if the output, or the unfinished bundle beside it, lies inside an input or the other way
    round, or inside another bundle.
    """
    if (out.parent / MANIFEST_NAME).is_file() or out.absolute().parent.name.endswith(_SUFFIXES):
        raise UsageError(
            "the output lies inside another bundle, which would then be no sound one",
            where=str(out),
            hint="choose another folder",
        )
    for place in (out, partial_path(out)):
        resolved = place.resolve()
        for source in sources:
            inside = source.resolve()
            if resolved == inside or inside in resolved.parents:
                raise UsageError("the output lies inside an input", where=str(place), got=str(source))
            if resolved in inside.parents:
                raise UsageError("an input lies inside the output", where=str(place), got=str(source))


def _name_limit(folder: Path) -> int:
    """Bytes of a file's name where the output will be."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):  # no such folder, which is refused by itself; or a system that does not say
        return _USUAL_NAME_BYTES
