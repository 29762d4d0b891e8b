"""A rank other than the first, as a process: ``python -m krasis.runtime.distributed.worker``. Started by
``workers``, not by hand."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from krasis.formats.errors import KrasisError
from krasis.formats.files import mapping_guard
from krasis.formats.process.stages import stage
from krasis.runtime.device.driver import make_context
from krasis.runtime.distributed.errors import RankError
from krasis.runtime.distributed.place import Place
from krasis.runtime.early import Early
from krasis.runtime.settings import EngineSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until rank 0 closes; gives the exit code."""
    parser = argparse.ArgumentParser(prog="krasis-rank")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--settings", required=True, help="EngineSettings as JSON")
    parser.add_argument("--log-level", type=int, default=logging.WARNING)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=options.log_level, format="%(name)s: %(message)s", stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Rank 0 decides what they mean: it may still have something to save. When it has gone, so do we.
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, name="krasis-parent", daemon=True).start()
    settings, place = EngineSettings(**json.loads(options.settings)), Place.from_environment()
    if settings.device != "double":
        Early(lambda: make_context(place.local_rank))  # torch waits for it where it needs it
    return run_rank(options.bundle, settings, place)


def serve_rank(bundle: Path, settings: EngineSettings, place: Place) -> None:
    """``job.serve_rank``, once torch is imported: that takes as long as rank 0 needs for the same."""
    with stage("import torch and what runs on GPUs"):
        from krasis.runtime.distributed import job

    job.serve_rank(bundle, settings, place)


def run_rank(bundle: Path, settings: EngineSettings, place: Place) -> int:
    """``serve_rank``, its errors as a line on standard error and an exit code."""
    try:
        mapping_guard.install(f"krasis-run: rank {place.rank}")
        serve_rank(bundle, settings, place)
    except KrasisError as error:
        print(f"krasis-run: rank {place.rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _leave_with_parent() -> None:
    """Ends the process when the pipe from rank 0's process breaks."""
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(RankError.exit_code)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failure, the destructors of NCCL and of CUDA may wait for ranks that are gone.
    os._exit(code)
