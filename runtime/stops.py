"""What a caller says by ``stop``: one text or several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from krasis.formats.errors import UsageError
from krasis.formats.plain_text import plain_text


def stop_texts(stop: object) -> tuple[str, ...]:
    """The stop strings; one text is one of them, None is none. Raises UsageError for anything else."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (plain_text(stop, "a stop string"),)
    if isinstance(stop, (bytes, bytearray, memoryview, Mapping)) or not isinstance(stop, Iterable):
        raise UsageError("stop must be a text or a list of texts", got=type(stop).__name__)
    return tuple(plain_text(one, "a stop string") for one in stop)
