"""Named stretches of a command's start, told to the log: what takes how long until the first token.

A stage is one line at the level DEBUG (``krasis-run -vv``) of the logger ``krasis.stages``. Its times are
those of the system's monotonic clock, which all processes share, so that ``scripts/profile_start.py`` can
lay the stages of several ranks side by side.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger("krasis.stages")

_LINE = re.compile(r"^(?:\[rank (\d+)\] )?krasis\.stages: (.+): (\d+\.\d+) s from (\d+\.\d+)$")


@dataclass(frozen=True, slots=True)
class Stage:
    """begin_s: by the monotonic clock. seconds: that it took. rank: of the process that it was in."""

    name: str
    begin_s: float
    seconds: float
    rank: int = 0


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What happens inside is a stage of the start."""
    begin_s = time.monotonic()
    try:
        yield
    finally:
        tell(name, begin_s)


def tell(name: str, begin_s: float) -> None:
    """A stage that began at begin_s (``time.monotonic``) ends now."""
    logger.debug("%s: %.4f s from %.4f", name, time.monotonic() - begin_s, begin_s)


def read_stage(line: str) -> Stage | None:
    """The stage that a line of a command's log tells of; None for any other line."""
    found = _LINE.match(line.rstrip())
    if found is None:
        return None
    rank, name, seconds, begin_s = found.groups()
    return Stage(name, float(begin_s), float(seconds), int(rank or 0))
