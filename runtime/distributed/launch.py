"""Opening a bundle on several GPUs: of this host (``--gpus N``), or of several hosts through torchrun."""

from __future__ import annotations

import json
import logging
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UsageError
from krasis.formats.process.stages import stage
from krasis.runtime.backend import Backend
from krasis.runtime.distributed.launcher import is_launched_rank, is_worker_rank
from krasis.runtime.distributed.place import (
    Place,
    host_local_store,
    host_store,
    listen_locally,
    local_place,
)
from krasis.runtime.distributed.workers import Workers
from krasis.runtime.engine import Engine, MakeBackend
from krasis.runtime.gpu.partition import Partition
from krasis.runtime.missing_kernels import refuse_ranks
from krasis.runtime.planning.shape import shape_of
from krasis.runtime.settings import EngineSettings

if TYPE_CHECKING:
    from krasis.runtime.distributed.store import Store

LINGER_S = 3.0


def open_engine(path: Path, settings: EngineSettings, num_gpus: int | None = None) -> Engine | None:
    """``Engine.open`` on several ranks; closing the engine ends them.

    num_gpus: of this host, None = one, or as torchrun says. Started by torchrun, only rank 0 gets an engine;
    on the others this serves rank 0 until it closes, and gives None. Raises RankError if a rank fails,
    UsageError for more GPUs than there are.
    """
    if is_worker_rank():
        follow(path, settings, num_gpus)
        return None
    return Engine.open(path, settings, backend_opener(settings, num_gpus))


def follow(path: Path, settings: EngineSettings, num_gpus: int | None = None) -> None:
    """What a rank does that torchrun started and that is not the first: serves rank 0 until it closes."""
    from krasis.runtime.distributed.job import serve_rank

    serve_rank(path, settings, _launched_place(num_gpus))


def backend_opener(settings: EngineSettings, num_gpus: int | None = None) -> MakeBackend | None:
    """What opens a bundle's backend on several ranks, of which this process is the first; None for one GPU.
    Raises UsageError, see ``open_engine``."""
    if is_launched_rank():
        place = _launched_place(num_gpus)
        store = host_store(place) if place.hosts_store else None
        return lambda bundle, chosen: _launched(bundle, chosen, place, store)
    if num_gpus is not None and settings.device == "cpu":
        raise UsageError("--gpus needs GPUs", got="--device cpu", hint="leave out one of them")
    if num_gpus is None or num_gpus == 1:
        return None
    if num_gpus < 1:
        raise UsageError("--gpus must be positive", got=num_gpus)
    return lambda bundle, chosen: _spawned(bundle, chosen, num_gpus)


def _launched_place(num_gpus: int | None) -> Place:
    place = Place.from_environment()
    if num_gpus is not None and num_gpus != place.num_local_ranks:
        raise UsageError(
            "--gpus differs from what torchrun started",
            got=num_gpus,
            limit=place.num_local_ranks,
            hint="leave out --gpus, or set torchrun's --nproc-per-node",
        )
    return place


def _launched(bundle: Bundle, settings: EngineSettings, place: Place, store: Store | None) -> Backend:
    """Rank 0 of a job that torchrun started."""
    from krasis.runtime.distributed.first_rank import open_first_rank

    with ExitStack() as undo:
        linger_s = LINGER_S if place.hosts_store else 0.0
        return open_first_rank(bundle, settings, place, store, None, undo, linger_s)


def _spawned(bundle: Bundle, settings: EngineSettings, num_ranks: int) -> Backend:
    """Rank 0 of a job on this host, whose other ranks are our children. They are started before this process
    imports torch, which takes all of them as long."""
    from krasis.runtime.gpu.opening import begin_context, refuse

    # Now, not when all have started.
    Partition(num_ranks).experts(shape_of(bundle.spec).num_experts, 0)
    refuse(bundle, settings)
    refuse_ranks(bundle.spec, num_ranks)
    begin_context(settings)
    # All on this host: Gloo shall not look for a network (NCCL finds its own way).
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with ExitStack() as undo:
        listener = undo.enter_context(listen_locally(num_ranks))
        place = local_place(num_ranks, 0, listener)
        level = logging.getLogger().getEffectiveLevel()
        arguments = [
            "--bundle",
            str(bundle.path.resolve()),
            "--settings",
            json.dumps(asdict(settings)),
            "--log-level",
            str(level),
        ]
        workers = Workers(place, arguments)
        undo.callback(workers.close)
        with stage("import torch and what runs on GPUs"):
            from krasis.runtime.distributed.devices import check_gpu_count
            from krasis.runtime.distributed.first_rank import open_first_rank
        check_gpu_count(settings, num_ranks)
        return open_first_rank(bundle, settings, place, host_local_store(listener), workers, undo, 0.0)
