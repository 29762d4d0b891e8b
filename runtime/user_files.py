"""Texts that a user names or pipes: of regular files only, read at once and never beyond a bound.

A FIFO or a device named by mistake would block for ever, or give bytes for ever; so would an endless pipe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from krasis.formats.errors import FormatError, ResourceError, UsageError
from krasis.formats.files.regular_file import read_small_file
from krasis.formats.limits import MIB

if TYPE_CHECKING:
    from krasis.runtime.text.chat import Message
    from krasis.runtime.text.tokenizer import Tokenizer

MAX_PROMPT_BYTES = 16 * MIB
# Less is tokenised in a moment, and then the sentence has the number of tokens.
_MOMENT_CHARACTERS = 256 * 1024
# Normalisation (NFC) makes at most one character of three.
_SHRINKING = 3


def read_user_file(path: Path, what: str, max_bytes: int) -> bytes:
    """The contents of a regular file, or of what a link leads to. what: ``the prompt``, for the sentence.

    Raises UsageError if it is missing, too large, no regular file, or refused by the system.
    """
    try:
        return read_small_file(path, max_bytes, follow_links=True)
    except (FormatError, ResourceError) as error:
        hint = error.hint if isinstance(error, ResourceError) else ""
        if error.what == "not a regular file":
            hint = "name the file itself; a pipe goes to standard input"
        if error.what == "file is missing":
            hint = "check the path"
        raise UsageError(
            f"{what} cannot be read: {error.what}",
            where=str(path),
            got=error.got,
            limit=error.limit,
            hint=hint,
        ) from error


def read_stdin() -> bytes:
    """Standard input to its end. UsageError if it is longer than any prompt may be, or cannot be read."""
    if sys.stdin is None:
        raise UsageError("standard input is closed", hint="give the prompt by --prompt or --file")
    try:
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise UsageError("standard input cannot be read", got=error.strerror) from error
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError("standard input is longer than any prompt", limit=f"{MAX_PROMPT_BYTES} bytes")
    return data


def check_length(
    prompt: str | Sequence[Message] | Sequence[Mapping[str, str]], context: int, tokenizer: Tokenizer
) -> None:
    """UsageError for a text that cannot fit the context however its tokens fall: long before, and much sooner
    than, they are counted.
    """
    texts = [prompt] if isinstance(prompt, str) else [_content(message) for message in prompt]
    num_characters = sum(map(len, texts))
    if num_characters <= _MOMENT_CHARACTERS:
        return
    limit = context * tokenizer.longest_token * _SHRINKING
    if num_characters > limit:
        raise UsageError(
            "the context is full",
            got=f"{num_characters} characters",
            limit=f"{context} tokens, which hold at most {limit}",
            hint="shorten the prompt, or open with a larger context (--ctx)",
        )


def _content(message: Message | Mapping[str, str]) -> str:
    content = message["content"] if isinstance(message, Mapping) else message.content
    return content if isinstance(content, str) else ""
