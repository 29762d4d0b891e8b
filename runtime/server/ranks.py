"""A server on several GPUs: which rank this process is, and what opens the model on all of them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from krasis.runtime.distributed.launcher import is_launched_rank

if TYPE_CHECKING:
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.backend import Backend
    from krasis.runtime.settings import EngineSettings

    MakeBackend = Callable[[Bundle, EngineSettings], Backend]


def follow_first(bundle: Path, engine: EngineSettings, num_gpus: int | None) -> None:
    """What a process does that torchrun started as another rank than the first: rank 0, which alone listens
    and answers, has closed when this returns. Raises RankError if a rank fails."""
    from krasis.runtime.distributed.launch import follow

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # rank 0 gets them too, and has prefixes to save
    follow(bundle, engine, num_gpus)


def backend_opener(engine: EngineSettings, num_gpus: int | None) -> MakeBackend | None:
    """What opens the model; None: as it is opened on one GPU, or none. Raises UsageError for a number of GPUs
    that contradicts other settings."""
    if num_gpus is None and not is_launched_rank():
        return None  # without torch, which the CPU does not need
    from krasis.runtime.distributed import launch

    return launch.backend_opener(engine, num_gpus)
