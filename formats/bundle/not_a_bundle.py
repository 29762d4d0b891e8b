"""What is given where a bundle belongs: a GGUF, a checkpoint, a file of a bundle, a clone without git-lfs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from krasis.formats.bundle.manifest import MANIFEST_NAME
from krasis.formats.errors import FormatError, KrasisError
from krasis.formats.files.file_kinds import kind_of_bytes, read_head
from krasis.formats.files.regular_file import open_regular

_CONVERT = "convert it first: krasis-convert {path} -o model.krasis"
_GIVE_FOLDER = "a bundle is the directory that krasis-convert wrote"


def explain_file(path: Path) -> FormatError:
    """The reason why a path that exists and is no folder is no bundle."""
    where = str(path)
    if path.name == MANIFEST_NAME or (path.parent / MANIFEST_NAME).is_file():
        return FormatError("not a directory but a file of a bundle", where=where, hint=f"give {path.parent}")
    try:
        fd = open_regular(path, follow_links=True)
        try:
            head = read_head(fd, where)
        finally:
            os.close(fd)
    except KrasisError:
        return FormatError("not a directory", where=where, hint=_GIVE_FOLDER)
    if head.startswith(b"GGUF"):
        return FormatError("this is a GGUF, not a bundle", where=where, hint=_CONVERT.format(path=path))
    if head[8:9] == b"{":
        hint = _CONVERT.format(path=path.parent)
        return FormatError("this is a safetensors file, not a bundle", where=where, hint=hint)
    kind = kind_of_bytes(head)
    what = f"not a directory but {kind.what}" if kind is not None else "not a directory"
    return FormatError(what, where=where, hint=_GIVE_FOLDER)


def explain_folder(path: Path, names: Sequence[str]) -> FormatError:
    """The reason why a folder without a manifest is no bundle."""
    where = str(path)
    if "config.json" in names or any(name.endswith((".gguf", ".safetensors")) for name in names):
        what = (
            "this is a GGUF's folder, not a bundle" if any(name.endswith(".gguf") for name in names) else ""
        )
        what = what or "this is a Hugging Face checkpoint, not a bundle"
        return FormatError(what, where=where, hint=_CONVERT.format(path=path))
    below = [name for name in names if (path / name / MANIFEST_NAME).is_file()]
    hint = f"give {path / below[0]}" if below else "give the directory that krasis-convert wrote"
    return FormatError("not a bundle: it has no manifest", where=where, hint=hint)


def refuse_pointer(fd: int, where: str) -> None:
    """Raises FormatError if a file of a bundle is something known that was put in its place by a clone or a
    download, such as a git-lfs pointer.
    """
    kind = kind_of_bytes(read_head(fd, where))
    if kind is not None and not kind.what.startswith(("a text", "a JSON text")):
        raise FormatError(f"not the bundle's file: this is {kind.what}", where=where, hint=kind.hint)
