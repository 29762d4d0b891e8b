"""Which version of Krasis this is."""

from __future__ import annotations

import functools

DISTRIBUTION = "krasis-bundle"


@functools.cache
def tool_version() -> str:
    """The version of the installed distribution; ``0+unknown`` where the code runs without one."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom needed

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "0+unknown"
