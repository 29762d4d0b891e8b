"""stdin, stdout and stderr as services, pipes and old terminals leave them: closed, full, of any encoding.

``prepare_streams`` comes first in every command. ``write_output`` writes what the command was asked for.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

from krasis.formats.errors import ResourceError, UsageError

BROKEN_PIPE = 141  # what a shell reports for a command that wrote into a pipe without a reader


class OutputError(ResourceError):
    """stdout takes nothing more."""


class BrokenOutputError(OutputError):
    """Who read stdout has left."""

    exit_code = BROKEN_PIPE


class _LenientFile(io.FileIO):
    """stderr's descriptor. A note that cannot be written is lost, and the work goes on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare_streams() -> None:
    """Makes the standard streams such that writing a note never fails and no character is too foreign.

    A closed descriptor is taken by /dev/null, lest the next file that is opened get its number and notes of
    a library be written into it. ``sys.stdin`` and ``sys.stdout`` stay None where they were closed: see
    ``check_stdout``. What an encoding lacks is written as ``?`` (stdout) or escaped (stderr); bytes on stdin
    that are no text become lone surrogates, for the reader to refuse.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is this one. Children inherit it, as they would the real one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stderr is sys.__stderr__:  # not a test's, nor an embedder's
        sys.stderr = _lenient("utf-8" if sys.stderr is None else sys.stderr.encoding)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _lenient(encoding: str) -> TextIO:
    raw = _LenientFile(2, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(cast("io.RawIOBase", raw)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def check_stdout() -> None:
    """Raises UsageError if stdout is closed: before the work, where its result could not be written."""
    if sys.stdout is None:
        raise UsageError("stdout is closed: there is nowhere to write to", hint="redirect it: >FILE")


def write_output(text: str) -> None:
    """Writes text to stdout, at once; nothing where stdout is closed.

    Raises OutputError if the system refuses, such as on a full disk; BrokenOutputError if its reader
    has left.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise output_error(error) from error


def output_error(error: OSError) -> OutputError:
    """What it is for the user. Also gives up stdout: what is still in its buffer would fail again when the
    program ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    if isinstance(error, BrokenPipeError):
        return BrokenOutputError("the output was not read to its end: stdout is a pipe without a reader")
    return OutputError("the output cannot be written", where="stdout", got=error.strerror)


def finish_output() -> OutputError | None:
    """What is wrong with stdout, if what was printed does not reach it."""
    try:
        write_output("")
    except OutputError as error:
        return error
    return None
