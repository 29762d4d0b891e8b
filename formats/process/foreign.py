"""The border to libraries that other people wrote: whatever they raise becomes one of our errors.

A library written in Rust ends a failed assertion in a ``PanicException``, which is no ``Exception``; one
written in C may raise anything. Neither must reach a user as a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from krasis.formats.errors import FormatError, KrasisError, ResourceError

# What is not a failure of the library but somebody's wish to stop.
STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)


@contextmanager
def foreign_errors(what: str, where: str) -> Iterator[None]:
    """Within, an error of a library is raised as FormatError: what (a sentence), where (the file).

    Our own errors and interrupts pass; too little memory is a ResourceError.
    """
    try:
        yield
    except (KrasisError, *STOPS):
        raise
    except MemoryError as error:
        raise ResourceError(f"{what}: out of memory", where=where) from error
    except BaseException as error:
        raise FormatError(what, where=where, got=reason(error)) from error


def reason(error: BaseException) -> str:
    """What a foreign error says, in one line; its class where it says nothing."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001  a broken __str__ must not hide the error
        text = ""
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__} {text}".rstrip()
    return text
