"""Rank 0's side of opening a job. It imports torch: ``launch`` starts the other ranks before."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import krasis.runtime.gpu.backend  # noqa: F401  now, while other ranks do the same, not when all have met
from krasis.formats.bundle.reader import Bundle
from krasis.runtime.backend import Backend
from krasis.runtime.distributed.backend import DistributedBackend
from krasis.runtime.distributed.control import Control
from krasis.runtime.distributed.job import join
from krasis.runtime.distributed.place import Place
from krasis.runtime.distributed.store import Store
from krasis.runtime.distributed.workers import Workers
from krasis.runtime.settings import EngineSettings

logger = logging.getLogger(__name__)


def open_first_rank(
    bundle: Bundle,
    settings: EngineSettings,
    place: Place,
    store: Store | None,
    workers: Workers | None,
    undo: ExitStack,
    linger_s: float,
) -> Backend:
    """The backend that looks like one, once all ranks have opened theirs. store: kept alive as long as it, if
    this process hosts it. workers: the other ranks, if they are children. undo: frees all when the backend is
    closed. Raises RankError if a rank fails.
    """
    undo.callback(lambda: logger.debug("the job's store goes: %s", store))
    if workers is not None:
        undo.callback(workers.close)
    control = Control(place)
    undo.callback(control.close, linger_s)
    if workers is not None:
        workers.watch(control)
    with control.joint("opening"):
        rank = undo.enter_context(join(bundle, settings, place, control))
    return DistributedBackend(rank.backend, rank.parallel, control, undo.pop_all().close)
