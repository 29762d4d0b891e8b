"""What ends a request, as an error of this program."""

from __future__ import annotations

import logging

from krasis.formats.errors import KrasisError, NativeError, ResourceError

logger = logging.getLogger(__name__)


def as_krasis(error: BaseException) -> KrasisError:
    """The error itself, or what it means."""
    if isinstance(error, KrasisError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("there is not enough memory for this request")
    return NativeError("the engine failed on this request", got=f"{type(error).__name__}: {error}")


def is_lost(backend: object) -> bool:
    """Whether a backend whose batch has failed will fail at every other, as after an error of a GPU, which
    stays with the process. A backend that has a ``check`` raises by it if it works no more."""
    check = getattr(backend, "check", None)
    if check is None:
        return False
    try:
        check()
    except Exception as error:  # noqa: BLE001  whatever it says, it says that it is broken
        logger.error("the backend works no more: %s", error)
        return True
    return False
