"""Texts of a command line as text: Python hands over the bytes that it cannot read as half characters."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from krasis.formats.plain_text import plain_text


def read_texts(prompt: str | None, options: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """--prompt and the options with --system and --stop in UTF-8. Raises UsageError for one that is not."""
    system = options["system"]
    changed = {
        "system": None if system is None else argument_text(system, "the system message"),
        "stop": tuple(argument_text(one, "a stop string") for one in options["stop"]),
    }
    return None if prompt is None else argument_text(prompt, "the prompt"), {**options, **changed}


def argument_text(value: str, what: str) -> str:
    """An argument's text; under a locale that is not UTF-8 its bytes may be UTF-8 all the same."""
    with contextlib.suppress(UnicodeError):  # not UTF-8: then it is refused as what it is
        value = os.fsencode(value).decode("utf-8")
    return plain_text(value, what)
