"""The keys that clients of a server may show, as its options say them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from krasis.formats.errors import UsageError


def api_keys(given: Sequence[str], path: Path | None) -> tuple[str, ...]:
    """The keys given and those of the file. Raises UsageError for one that no header can carry."""
    keys = (*given, *keys_of(path))
    if any(not key.strip() or not key.isascii() or not key.isprintable() for key in keys):
        raise UsageError("an API key must be printable ASCII", where="--api-key")
    return keys


def keys_of(path: Path | None) -> list[str]:
    """The keys of a file, one a line; lines that begin with # are none. Raises UsageError for an unreadable
    file.
    """
    if path is None:
        return []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError("the file of keys cannot be read", where=str(path), got=error) from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
