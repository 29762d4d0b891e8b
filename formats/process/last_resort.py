"""The last handler of a command: what nobody foresaw ends in one sentence and an exit code, not in a
traceback.

The sentence says what to do: out of memory and what the system refuses are the machine's; all else is a fault
of ours, with the way to report it. ``-v`` or KRASIS_TRACEBACK=1 shows the traceback as well.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from krasis.formats.errors import KrasisError, ResourceError
from krasis.formats.printable import printable
from krasis.formats.process.foreign import STOPS, reason

EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
TRACEBACK_VARIABLE = "KRASIS_TRACEBACK"
_PASSED = (*STOPS, click.ClickException, click.Abort, click.exceptions.Exit)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def last_resort(program: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """A decorator of a command's function. program: the name that its sentences begin with."""

    def decorate(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(command)
        def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            threading.excepthook = lambda told: _tell(program, told.exc_value)
            try:
                return command(*args, **kwargs)
            except _PASSED:
                raise
            except BaseException as error:
                if isinstance(error, BrokenPipeError):
                    raise  # the reader has enough: click ends the command without a word
                _tell(program, error)
                sys.exit(exit_code(error))

        return guarded

    return decorate


def exit_code(error: BaseException) -> int:
    """What the command returns for it."""
    if isinstance(error, KrasisError):
        return error.exit_code
    return ResourceError.exit_code if isinstance(error, MemoryError | OSError) else EXIT_FAULT


def sentence(error: BaseException) -> str:
    """One line."""
    if isinstance(error, KrasisError):
        return str(error)
    if isinstance(error, MemoryError):
        return str(ResourceError("out of memory", hint="close other programs, or ask for less"))
    if isinstance(error, OSError) and error.errno is not None:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        hint = "free some disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return str(ResourceError(f"the system refused: {error.strerror}", where=where, hint=hint))
    what = f"{type(error).__name__}: {reason(error)}"
    return (
        f"this is a fault of Krasis: {printable(what, 300)}{_place(error)}. Please report it with this line "
        f"and what krasis-info --env prints; {TRACEBACK_VARIABLE}=1 shows more"
    )


def _place(error: BaseException) -> str:
    """The place in our code that the error came from."""
    found = ""
    step = error.__traceback__
    while step is not None:
        path = Path(step.tb_frame.f_code.co_filename)
        if step.tb_frame.f_globals.get("__name__", "").startswith("krasis."):
            found = f" (at {path.parent.name}/{path.name}:{step.tb_lineno})"
        step = step.tb_next
    return found


def _tell(program: str, error: BaseException | None) -> None:
    if error is None:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed or full
        print(f"{program}: {sentence(error)}", file=sys.stderr, flush=True)
        if os.environ.get(TRACEBACK_VARIABLE) or {"-v", "-vv", "--verbose"} & set(sys.argv):
            import traceback

            print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
