"""Names that come from files: what may be a tensor's name, and what may be a file's."""

from __future__ import annotations

import re

from krasis.formats.errors import FormatError
from krasis.formats.limits import MAX_FILE_NAME_BYTES, MAX_NAME_BYTES

# C0, DEL, C1 controls and lone surrogates: they corrupt a terminal or cannot be encoded at all.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def shown(name: object, max_chars: int = 80) -> str:
    """A name as it appears in a message: quoted, escaped and cut: a hostile one does no harm there."""
    if not isinstance(name, str):
        return f"{type(name).__name__} {str(name)[:max_chars]}"
    text = ascii(name[:max_chars])
    return text if len(name) <= max_chars else f"{text}... ({len(name)} characters)"


def _check_text(name: str, what: str, where: str, max_bytes: int) -> None:
    if not name:
        raise FormatError(f"{what} is empty", where=where)
    if len(name) > max_bytes or _UNPRINTABLE.search(name) or len(name.encode()) > max_bytes:
        raise FormatError(
            f"{what} is too long or has control characters",
            where=where,
            got=shown(name),
            limit=f"{max_bytes} bytes",
        )


def check_tensor_name(name: str, where: str) -> str:
    """The name itself, if it is 1 to 512 bytes of printable text. FormatError otherwise."""
    _check_text(name, "tensor name", where, MAX_NAME_BYTES)
    return name


def check_file_name(name: str, where: str) -> str:
    """The name itself, if it is a plain basename. FormatError for anything that could leave its directory."""
    _check_text(name, "file name", where, MAX_FILE_NAME_BYTES)
    if name in (".", "..") or "/" in name or "\\" in name:
        raise FormatError(
            "file name is not a plain name",
            where=where,
            got=shown(name),
            limit="no directories, no '..'",
            hint="the file may be hostile: get it from a source you trust",
        )
    return name
