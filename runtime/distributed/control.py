"""How ranks steer each other: commands from rank 0, agreement on numbers, and news of a failure.

All of it goes through torch.distributed's store (TCP, on rank 0 or torchrun's agent), none of it through the
collectives: those block, and would block for ever beside a dead rank. Rank 0 writes commands ``command/0``,
``command/1``, ...; a worker waits for the next without using the CPU.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from krasis.formats.errors import KrasisError
from krasis.runtime.distributed.errors import RankError
from krasis.runtime.distributed.place import Place
from krasis.runtime.distributed.watch import Watch

logger = logging.getLogger(__name__)

FOR_EVER = timedelta(days=365)
POLL_S = 0.0005
# A rank whose neighbour died sees a broken connection before it can be told who died; it waits so long for
# that.
NEWS_S = 3.0


@dataclass(slots=True)
class Outcome:
    """What ranks say at the end of a joint work. own: of this rank, before the end. all_ranks: after it."""

    own: str = ""
    all_ranks: Sequence[str] = ()


class Control:
    """One rank's line to the others. Commands, agreement and ``joint``: by one thread at a time.

    silence_s: a rank not heard of for so long counts as dead.
    """

    def __init__(self, place: Place, *, silence_s: float = 30.0) -> None:
        self.rank, self.num_ranks = place.rank, place.num_ranks
        self._store = place.connect()
        self._num_commands = 0
        self._num_agreements = 0
        self._watch = Watch(place.connect(), place.rank, place.num_ranks, silence_s)
        self._watch.start()

    @property
    def failure(self) -> str | None:
        """What ended the job; None while it is sound."""
        return self._watch.failure

    def on_failure(self, abort: Callable[[], None]) -> None:
        """Has abort called, from another thread, when the job fails: it must free whoever waits in a
        collective."""
        self._watch.abort = abort

    def send(self, name: str, **arguments: Any) -> None:
        """Rank 0 gives all others a command. Raises RankError if the job has failed."""
        self.raise_if_failed()
        try:
            self._store.set(f"command/{self._num_commands}", json.dumps({"name": name, **arguments}))
            if self._num_commands >= 2:
                # Every rank has taken part in the command after that one: nobody still has to read it.
                self._store.delete_key(f"command/{self._num_commands - 2}")
        except RuntimeError as error:
            raise self._lost(error, name) from error
        self._num_commands += 1

    def receive(self) -> dict[str, Any]:
        """The next command; waits for it as long as it takes."""
        key = f"command/{self._num_commands}"
        try:
            self._store.wait([key], FOR_EVER)
            text = self._store.get(key)
        except RuntimeError as error:
            raise RankError("rank 0 is gone", where=f"rank {self.rank}") from error
        self._num_commands += 1
        command: dict[str, Any] = json.loads(text)
        return command

    def exchange(self, text: str, limit_s: float = math.inf) -> list[str]:
        """Every rank's text, in their order. Raises RankError if a rank fails meanwhile, or takes longer."""
        keys = [f"agree/{self._num_agreements}/{rank}" for rank in range(self.num_ranks)]
        deadline = time.monotonic() + limit_s
        try:
            self._store.set(keys[self.rank], text)
            while not self._store.check(keys):
                self.raise_if_failed()
                if time.monotonic() > deadline:
                    missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                    raise RankError(
                        "ranks have not joined", got=f"no sign of ranks {missing}", limit=f"{limit_s} s"
                    )
                time.sleep(POLL_S)
            found = [self._store.get(key).decode() for key in keys]
            # All are here, so all have read the agreement before.
            self._store.delete_key(f"agree/{self._num_agreements - 1}/{self.rank}")
        except RuntimeError as error:
            raise self._lost(error) from error
        self._num_agreements += 1
        return found

    def agree(self, value: int) -> int:
        """The smallest value of all ranks."""
        return min(int(text) for text in self.exchange(str(value)))

    def same(self, what: str, text: str, limit_s: float = math.inf) -> None:
        """Raises RankError, on every rank, if the ranks' texts differ."""
        found = self.exchange(text, limit_s)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise RankError(f"ranks differ in {what}", where=f"rank {rank}", got=other, limit=found[0])

    def report(self, message: str) -> None:
        """Ends the job: every rank raises or exits with the first message reported."""
        self._watch.report(message)

    def raise_if_failed(self) -> None:
        """Raises RankError with the message that ended the job, if one did."""
        if self.failure is not None:
            raise RankError(self.failure)

    @contextmanager
    def joint(self, what: str) -> Generator[Outcome]:
        """Around work that all ranks do in step. An error here ends the job on all of them; what is to be
        said to all without ending it goes into the outcome.

        Raises the error if it is this rank's own, else RankError with the message of the rank that failed.
        """
        with self.working(what):
            outcome = Outcome()
            yield outcome
            outcome.all_ranks = self.exchange(outcome.own)

    @contextmanager
    def working(self, what: str) -> Generator[None]:
        """``joint`` without a word of the others at the end: they have answered otherwise."""
        self.raise_if_failed()
        self._watch.busy = True
        try:
            yield
        except KrasisError as error:
            self._watch.raised = True
            if self.failure is None:
                self.report(f"rank {self.rank}, {what}: {error}")
            raise
        except RuntimeError as error:  # torch's word for a broken collective
            self._watch.raised = True
            raise self._lost(error, what) from error
        except BaseException as error:
            self._watch.raised = True
            self.report(f"rank {self.rank}, {what}: {type(error).__name__}: {error}")
            raise
        finally:
            self._watch.busy = False

    def close(self, linger_s: float = 0.0) -> None:
        """Leaves the job in peace. Calling it again does nothing.

        linger_s: waits at most so long for the others to leave: for the rank whose process runs the store.
        """
        self._watch.stop()
        others = [f"left/{rank}" for rank in range(self.num_ranks) if rank != self.rank]
        deadline = time.monotonic() + linger_s
        try:
            while time.monotonic() < deadline and not self._store.check(others):
                time.sleep(0.01)
        except RuntimeError as error:
            logger.debug("rank %d leaves after the store: %s", self.rank, error)

    def _lost(self, error: RuntimeError, what: str = "agreement") -> RankError:
        """The error of a broken connection, in the words of who knows more."""
        deadline = time.monotonic() + NEWS_S
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.failure is None:
            reason = (str(error).splitlines() or [""])[0]
            self.report(f"rank {self.rank}, {what}: {type(error).__name__}: {reason}")
        return RankError(self.failure or f"rank {self.rank}, {what}: {error}")
