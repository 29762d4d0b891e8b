"""The other ranks of this host as child processes.

A worker cannot outlive us: the pipe to its standard input breaks when we die, however that happens, and it
leaves then. What it prints appears on our standard error, its rank before each line.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, TYPE_CHECKING

from krasis.runtime.distributed.place import Place

if TYPE_CHECKING:
    from krasis.runtime.distributed.control import Control

logger = logging.getLogger(__name__)

LEAVE_S = 10.0
LEAVE_AFTER_FAILURE_S = 2.0
POLL_S = 0.05
MODULE = "krasis.runtime.distributed.worker"


class Workers:
    """Ranks 1.. of a job on this host. arguments: of ``worker``. Ends them if not all can be started."""

    def __init__(self, place: Place, arguments: Sequence[str]) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._relays: list[threading.Thread] = []
        self._stopped = threading.Event()
        self._monitor: threading.Thread | None = None
        self._control: Control | None = None
        try:
            for rank in range(1, place.num_ranks):
                self._start(replace(place, rank=rank, local_rank=rank, hosts_store=False), arguments)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def watch(self, control: Control) -> None:
        """From now on a worker that ends unasked is reported; and once the job has failed, those that do not
        leave by themselves are killed, which frees whoever waits for them."""
        self._control = control
        self._monitor = threading.Thread(
            target=self._watch, args=(control,), name="krasis-workers", daemon=True
        )
        self._monitor.start()

    def close(self) -> None:
        """Waits until all have left; ends those that do not. Calling it again does nothing."""
        self._stopped.set()
        if self._control is None:
            for process in self._processes.values():
                if process.stdin is not None:
                    process.stdin.close()  # nobody will ask them to leave: this makes them
        asked_to_leave = self._control is None or self._control.failure is None
        leave_s = LEAVE_S if asked_to_leave else LEAVE_AFTER_FAILURE_S
        if self._monitor is not None and self._monitor is not threading.current_thread():
            self._monitor.join()
        deadline = time.monotonic() + leave_s
        for rank, process in self._processes.items():
            if not _has_left(process, deadline - time.monotonic()):
                logger.warning("rank %d does not leave: it is ended", rank)
                process.kill()  # it ignores anything milder
                process.wait()
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()
        for relay in self._relays:
            relay.join(timeout=1.0)

    def _start(self, place: Place, arguments: Sequence[str]) -> None:
        flags = ["-O"] if sys.flags.optimize else []
        # In our process group. What ends us there they ignore: they leave when we do.
        process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
            [sys.executable, *flags, "-m", MODULE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place.environment(), "PYTHONUNBUFFERED": "1"},
        )
        self._processes[place.rank] = process
        logger.info("rank %d is process %d", place.rank, process.pid)
        if process.stdout is not None:
            relay = threading.Thread(target=_relay, args=(place.rank, process.stdout), daemon=True)
            relay.start()
            self._relays.append(relay)

    def _watch(self, control: Control) -> None:
        while control.failure is None and not self._stopped.wait(POLL_S):
            for rank, process in self._processes.items():
                code = process.poll()
                if code is not None and not self._stopped.is_set():
                    control.report(f"rank {rank} ended: {_ending(code)}")
                    break
        if control.failure is not None and not self._stopped.wait(LEAVE_AFTER_FAILURE_S):
            for process in self._processes.values():
                process.kill()


def _has_left(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True


def _ending(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _relay(rank: int, lines: IO[bytes]) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(f"[rank {rank}] {line.decode(errors='replace').rstrip()}\n")
            sys.stderr.flush()
