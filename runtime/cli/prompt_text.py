"""The one prompt that a command is given: what is piped in, a file, an option."""

from __future__ import annotations

import sys
from pathlib import Path

from krasis.formats.errors import UsageError
from krasis.runtime.cli.piped_text import is_piped, join_prompt, read_piped
from krasis.runtime.user_files import MAX_PROMPT_BYTES, read_stdin, read_user_file


def prompt_text(prompt: str | None, path: Path | None) -> str | None:
    """The one prompt to answer: a text piped in, then that of the file, then that of --prompt; None for a
    chat. Raises UsageError if there is none or one is unreadable.
    """
    from_stdin = path is not None and str(path) == "-"
    alone = prompt is None and path is None
    if alone and sys.stdin is not None and sys.stdin.isatty():
        return None
    if sys.stdin is None and (alone or from_stdin):
        raise UsageError("there is no prompt: stdin is closed", hint="give it by --prompt or --file")
    pieces = []
    if alone or from_stdin or is_piped():
        pieces.append(_decode(read_piped(read_stdin, alone=alone or from_stdin), "stdin"))
    if path is not None and not from_stdin:
        pieces.append(_decode(read_user_file(path, "the prompt", MAX_PROMPT_BYTES), str(path)))
    text = join_prompt([*pieces, prompt or ""])
    if not text:
        what = "there is no prompt: stdin is empty" if alone else "the prompt is empty"
        raise UsageError(what, hint="give it by --prompt or --file" if alone else "")
    return text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise UsageError(
            "the prompt is not UTF-8 text", where=where, got=f"bad byte at {error.start}"
        ) from error
