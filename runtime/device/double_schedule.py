"""When the double's operations run: in each stream in order, after their events, otherwise as a seed decides.

One operation runs at a time, on whichever thread needs it to, without the lock: others may go on submitting.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from krasis.formats.errors import UsageError
from krasis.runtime.device.double_memory import Allocation
from krasis.runtime.device.ordering import Clock, OrderingError, Ranges

POLICIES = ("eager", "late", "random")
Touched = tuple[Allocation, Ranges]


@dataclass(slots=True, eq=False)
class Operation:
    """One launch, copy or event of a stream.

    after: operations of other streams that come first. seen: what the host knew when it submitted this.
    clock: what is known to be over once this is, itself included; None until its accesses were checked.
    keep: what must live until it ran. sets, awaits: addresses of flags.
    """

    stream: int
    label: str
    action: Callable[[], None] | None
    after: tuple[Operation, ...]
    seen: Clock
    reads: tuple[Touched, ...] = ()
    writes: tuple[Touched, ...] = ()
    sets: tuple[int, ...] = ()
    awaits: tuple[int, ...] = ()
    keep: tuple[torch.Tensor, ...] = ()
    number: int = 0
    is_done: bool = False
    clock: Clock | None = None
    num_polls: int = 0


class Schedule:
    """The queues of all streams. Whoever calls a method holds ``lock``; run carries out one operation.

    policy: ``eager`` (at once), ``late`` (only what the host waits for, and only then) or ``random`` (some
    streams lag behind others by chance). What waits for a flag runs only when nothing else can.
    """

    def __init__(self, policy: str, seed: int, run: Callable[[Operation], None]) -> None:
        self.policy = policy
        self.executed: list[str] = []
        self.lock = threading.Condition(threading.Lock())
        self._run = run
        self._random = random.Random(seed)  # noqa: S311
        self._queues: list[deque[Operation]] = []
        self._eagerness: list[float] = []
        self._num_submitted: list[int] = []
        self._runner: int | None = None  # the thread that runs an operation now
        self._server: int | None = None  # the thread that runs them all

    def add_stream(self) -> int:
        """The number of a new stream."""
        self._queues.append(deque())
        self._num_submitted.append(0)
        self._eagerness.append(self._random.choice((0.02, 0.3, 1.0)))
        return len(self._queues) - 1

    def submit(self, operation: Operation) -> None:
        """Queues it, and lets chance run something."""
        operation.number = self._num_submitted[operation.stream]
        self._num_submitted[operation.stream] += 1
        self._queues[operation.stream].append(operation)
        self.lock.notify_all()
        while self._runner is None and self._server is None and self.policy != "late":
            heads = [head for head in self._heads() if not head.awaits]
            if not heads or (self.policy == "random" and self._random.random() < 0.5):
                return
            chosen = heads[0] if self.policy == "eager" else self._random.choice(heads)
            if self.policy == "eager" or self._random.random() < self._eagerness[chosen.stream]:
                self._execute(chosen)

    def poll(self, operation: Operation) -> bool:
        """Whether it is done; asked again and again, it gets done."""
        operation.num_polls += 1
        patience = {"eager": 0, "late": 3, "random": 2}[self.policy]
        is_free = self._runner is None and self._server is None
        if is_free and not operation.is_done and operation.num_polls > patience:
            self._execute(self._choose(self._heads(self._needed(operation))))
        return operation.is_done

    def finish(self, operation: Operation) -> None:
        """Runs what must come before it, and it."""
        if operation.is_done:
            return
        needed = self._needed(operation)
        while not operation.is_done:
            self._step(needed)

    def finish_all(self) -> None:
        """Runs everything."""
        while any(self._queues) or self._runner is not None:
            self._step(None)

    def finish_what_can(self) -> None:
        """Runs what waits for no flag; nothing if another thread is running something."""
        while self._runner is None and self._server is None:
            heads = [head for head in self._heads() if not head.awaits]
            if not heads:
                return
            self._execute(self._choose(heads))

    def serve(self, host: Future[None]) -> None:
        """Runs operations on this thread, as they come, until host is over and none is left, or it failed."""
        if self._server is not None:
            raise UsageError("the device is serving already", where="Device.serve")
        self._server = threading.get_ident()
        try:
            while not host.done() or (host.exception() is None and any(self._queues)):
                if any(self._queues) and self._runner is None:
                    self._execute(self._choose(self._heads()))
                else:
                    self.lock.wait(0.01)
        finally:
            self._server = None
            self.lock.notify_all()

    def discard_all(self) -> None:
        """Forgets what did not run."""
        for queue in self._queues:
            while queue:
                _retire(queue.popleft())
        self.lock.notify_all()

    @contextmanager
    def unlocked(self) -> Iterator[None]:
        """Inside, other threads may submit."""
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()

    def _step(self, needed: list[int] | None) -> None:
        here = threading.get_ident()
        if self._runner == here:
            raise UsageError("an action cannot wait for the device it runs on", where="DeviceDouble")
        if self._runner is not None or self._server not in (None, here):
            self.lock.wait()
        else:
            self._execute(self._choose(self._heads(needed)))

    def _choose(self, heads: list[Operation]) -> Operation:
        if not heads:
            raise OrderingError("streams wait for each other", where="DeviceDouble")
        free = [head for head in heads if not head.awaits] or heads
        return free[0] if self.policy == "eager" else self._random.choice(free)

    def _heads(self, needed: list[int] | None = None) -> list[Operation]:
        """What can run now."""
        heads = [queue[0] for queue in self._queues if queue]
        runnable = [head for head in heads if all(before.is_done for before in head.after)]
        return [head for head in runnable if needed is None or head.number <= needed[head.stream]]

    def _needed(self, operation: Operation) -> list[int]:
        """For each stream the number of the last operation that must run before this one has; -1: none."""
        needed = [-1] * len(self._queues)
        to_visit = [operation]
        while to_visit:
            last = to_visit.pop()
            before = needed[last.stream]
            if last.is_done or last.number <= before:
                continue
            needed[last.stream] = last.number
            for queued in self._queues[last.stream]:
                if before < queued.number <= last.number:
                    to_visit.extend(queued.after)
        return needed

    def _execute(self, operation: Operation) -> None:
        self._runner = threading.get_ident()
        try:
            self._run(operation)
        except Exception as error:
            error.add_note(f"in {operation.label}, run on the device's double")
            raise
        finally:
            # Only now: a queue is empty when its last operation has run.
            queue = self._queues[operation.stream]
            if queue and queue[0] is operation:
                queue.popleft()
            _retire(operation)
            self._runner = None
            self.lock.notify_all()


def _retire(operation: Operation) -> None:
    operation.is_done = True
    operation.action, operation.after, operation.keep = None, (), ()
    operation.reads = operation.writes = ()
