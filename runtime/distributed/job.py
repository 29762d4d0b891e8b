"""Joining a job: from a place to a rank that has its device, its experts and its line to the others."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import KrasisError
from krasis.formats.process.stages import stage
from krasis.runtime.bundle_opening import open_bundle
from krasis.runtime.distributed.backend import serve
from krasis.runtime.distributed.control import Control
from krasis.runtime.distributed.place import Place
from krasis.runtime.distributed.ranked import RankedBackend
from krasis.runtime.distributed.store import CONNECT_S
from krasis.runtime.distributed.torch_parallel import TorchParallel, abort_group, join_group, leave_group
from krasis.runtime.gpu.parallel_decode import RankLink
from krasis.runtime.gpu.parallel_follower import RankFollower
from krasis.runtime.planning.shape import shape_of
from krasis.runtime.settings import EngineSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rank:
    """What a rank has when it has joined."""

    parallel: TorchParallel
    control: Control
    backend: RankedBackend


def serve_rank(path: Path, settings: EngineSettings, place: Place) -> None:
    """A rank other than the first, from its start to rank 0's close. Raises KrasisError."""
    with ExitStack() as undo:
        control = Control(place)
        undo.callback(control.close)
        with control.joint("opening"):
            bundle = undo.enter_context(open_bundle(path, settings))
            rank = undo.enter_context(join(bundle, settings, place, control))
        serve(rank.backend, rank.parallel, control)


@contextmanager
def join(bundle: Bundle, settings: EngineSettings, place: Place, control: Control) -> Generator[Rank]:
    """Opens this rank's device and backend, when all ranks are there and agree on model and settings.

    Call it inside ``control.joint``, so that an error here is known everywhere. Leaves the group afterwards.
    """
    from krasis.runtime.distributed.devices import check_settings, open_rank_backend, open_rank_device

    with stage("wait for the other ranks"):
        control.same("bundle or settings", _fingerprint(bundle, settings), limit_s=CONNECT_S)
    check_settings(bundle, settings)
    with ExitStack() as undo:
        with stage("open the device"):
            device = open_rank_device(settings, place)
        undo.callback(_close, device.close, control)
        control.on_failure(abort_group)
        # Again in step: nobody waits in the group for a rank that could not open its device.
        control.agree(0)
        undo.callback(lambda: leave_group(failed=control.failure is not None))
        with stage("join the group"):
            join_group(place, device.torch_device)
        parallel = TorchParallel(place, control, shape_of(bundle.spec).num_experts)
        backend = open_rank_backend(bundle, settings, device, parallel)
        undo.callback(_close, backend.close, control)
        if (ranks := backend.decode_ranks) is not None:
            control.on_failure(partial(_abort, ranks))
        logger.info(
            "rank %d of %d: experts %d..%d of each layer; %s",
            place.rank,
            place.num_ranks,
            parallel.first_expert,
            parallel.first_expert + parallel.num_experts - 1,
            backend.description,
        )
        yield Rank(parallel, control, backend)


def _abort(ranks: RankLink | RankFollower) -> None:
    """Flags first: a GPU that waits for another's would not let its collectives end."""
    ranks.release()
    abort_group()


def _close(close: Callable[[], None], control: Control) -> None:
    """After a failure, closing trips over what was left half-done; the failure is the news, not that."""
    try:
        close()
    except (KrasisError, RuntimeError) as error:
        if control.failure is None:
            raise
        logger.debug("closing after a failure: %s", error)


def _fingerprint(bundle: Bundle, settings: EngineSettings) -> str:
    """Digest of all that decides the sequence of collectives; short enough to be shown when ranks differ."""
    manifest = hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()[:16]
    # threads: of each host's own CPUs; no rank has to have as many as another.
    chosen = {name: value for name, value in asdict(settings).items() if name not in ("threads", "isa")}
    return f"manifest {manifest}, {json.dumps(chosen, sort_keys=True)}"
