"""The prompt of one answer, from all its places: what is piped in, a file, the command line."""

from __future__ import annotations

import io
import os
import select
import stat
import sys
from collections.abc import Callable

from krasis.formats.errors import UsageError

PATIENCE_S = 2.0  # a pipe that is silent for longer is told of


def join_prompt(pieces: list[str]) -> str:
    """The pieces that say anything, a blank line between; one alone stays as it is."""
    said = [piece for piece in pieces if piece.strip()]
    if len(said) < 2:
        return "".join(said)
    return "\n\n".join([*(piece.strip("\n") for piece in said[:-1]), said[-1]])


def is_piped() -> bool:
    """Whether stdin is a pipe, a file or a socket: there is a document to read. Terminals and devices such as
    /dev/null are not.
    """
    if sys.stdin is None:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, io.UnsupportedOperation):  # not a real descriptor: a test's, or an embedder's
        return not sys.stdin.isatty()
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_piped(read: Callable[[], bytes], *, alone: bool) -> bytes:
    """What read gives of stdin; tells of a pipe that keeps us waiting. alone: there is no other text.

    Raises UsageError if it cannot be read.
    """
    try:
        descriptor: int | None = sys.stdin.fileno()
    except (OSError, io.UnsupportedOperation):
        descriptor = None
    try:
        if descriptor is not None and not select.select([descriptor], [], [], PATIENCE_S)[0]:
            from krasis.runtime.cli.output import note

            joined = "" if alone else ", which goes before the prompt; </dev/null leaves it out"
            note(f"waiting for the text on stdin{joined}")
        return read()
    except OSError as error:
        raise UsageError("the prompt cannot be read", where="stdin", got=error.strerror) from error
