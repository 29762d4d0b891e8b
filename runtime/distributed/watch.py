"""A thread of each rank that says "alive", listens for a failure, and notices a rank that fell silent.

A rank that is killed cannot report anything: its launcher does (``workers``), or this does after
``silence_s``. Once a failure is known the collectives are aborted; a process whose main thread is still stuck
after a while is ended, so that no rank hangs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from krasis.runtime.distributed.errors import RankError
from krasis.runtime.distributed.store import Store

logger = logging.getLogger(__name__)

INTERVAL_S = 0.2
WORKER_GRACE_S = 5.0
FIRST_RANK_GRACE_S = 20.0  # it has a user: an exception is worth waiting for
FAILURE = "failure"


class Watch:
    """See the module. busy: the main thread is in work that all ranks do in step. raised: it is on its way
    out with an error, and need not be ended. abort: frees whoever waits in a collective."""

    def __init__(self, store: Store, rank: int, num_ranks: int, silence_s: float) -> None:
        self.failure: str | None = None
        self.busy = False
        self.raised = False
        self.abort: Callable[[], None] | None = None
        self._store, self._rank, self._silence_s = store, rank, silence_s
        self._watched = list(range(1, num_ranks)) if rank == 0 else [0]
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"krasis-watch-{rank}", daemon=True)

    def start(self) -> None:
        """Begins. From now on silence counts. Raises RankError if the store is gone."""
        try:
            self._store.set(f"alive/{self._rank}", "0")
        except RuntimeError as error:
            raise RankError(self._store_lost(error)) from error
        self._thread.start()

    def stop(self) -> None:
        """This rank leaves in peace: others stop waiting for signs of life."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        try:
            self._store.set(f"left/{self._rank}", "1")
        except RuntimeError as error:  # rank 0 left first, and took the store along
            logger.debug("rank %d leaves after the store: %s", self._rank, error)

    def report(self, message: str) -> None:
        """Tells all ranks; the first message counts. May be called from any thread."""
        if self.failure is not None or self._stopped.is_set():
            return
        try:
            first = self._store.compare_set(FAILURE, "", message).decode()
        except RuntimeError as error:
            logger.debug("rank %d cannot report %r: %s", self._rank, message, error)
            first = message
        self.failure = self.failure or first

    def _run(self) -> None:
        beat = 0
        while not self._stopped.wait(INTERVAL_S):
            beat += 1
            try:
                self._store.set(f"alive/{self._rank}", str(beat))
                if self.failure is None and self._store.check([FAILURE]):
                    self.failure = self._store.get(FAILURE).decode()
                elif self.failure is None:
                    self._listen()
            except RuntimeError as error:
                if self._stopped.is_set():
                    return
                self.failure = self.failure or self._store_lost(error)
            if self.failure is not None:
                self._end()
                return

    def _listen(self) -> None:
        now = time.monotonic()
        for other in self._watched:
            if self._store.check([f"left/{other}"]):
                continue
            key = f"alive/{other}"
            if not self._store.check([key]):
                continue  # has not joined yet
            beat = self._store.get(key)
            last, since = self._heard.get(other, (b"", now))
            if beat != last:
                self._heard[other] = (beat, now)
            elif now - since > self._silence_s:
                self.report(f"rank {other} has not been heard of for {self._silence_s:.0f} s")

    def _store_lost(self, error: RuntimeError) -> str:
        reason = (str(error).splitlines() or [""])[0]
        logger.debug("rank %d: %s", self._rank, error)
        return f"rank {self._rank} has lost its connection to rank 0 ({reason})"

    def _end(self) -> None:
        """Frees the main thread, and ends the process if that does not help."""
        logger.info("rank %d: %s", self._rank, self.failure)
        if self.busy and self.abort is not None:
            self.abort()
        deadline = time.monotonic() + (WORKER_GRACE_S if self._rank else FIRST_RANK_GRACE_S)
        while self.busy and not self.raised and time.monotonic() < deadline:
            if self._stopped.wait(0.05):
                return
        if self.raised or (self._rank == 0 and not self.busy):
            return  # the error is on its way, or the next call raises it
        # Stuck in a call that nothing can interrupt (a collective beside a dead rank), or a worker that
        # idles.
        print(f"krasis: rank {self._rank} ends: {self.failure}", file=sys.stderr, flush=True)
        os._exit(RankError.exit_code)
