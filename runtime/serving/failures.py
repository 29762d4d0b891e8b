"""What ends a request, as an error of this program."""

from __future__ import annotations

from krasis.formats.errors import KrasisError, NativeError, ResourceError


def as_krasis(error: BaseException) -> KrasisError:
    """The error itself, or what it means."""
    if isinstance(error, KrasisError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("there is not enough memory for this request")
    return NativeError("the engine failed on this request", got=f"{type(error).__name__}: {error}")
