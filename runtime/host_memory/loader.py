"""Brings parts of memory up in the background, in order, by several threads."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from krasis.formats.errors import KrasisError, NativeError
from krasis.formats.process.machine_limits import usable_cpus

CHUNK_BYTES = 16 * 2**20
MAX_THREADS = 32
MAX_PINNING_THREADS = 8

Fill = Callable[[int, int, int], None]
Finish = Callable[[int], None]
End = Callable[[], None]


def default_threads() -> int:
    """Every CPU of the affinity mask, up to 32: first touch of fresh memory is what costs, and it is the
    CPU's.
    """
    return max(2, min(MAX_THREADS, usable_cpus()))


def pinning_threads() -> int:
    """Threads that pin pages which exist already: up to 8. On an H200's host eight registered 56 GB/s in
    pieces of 256 MiB, four 48; all of 32 CPUs would fight for the same locks.
    """
    return min(MAX_PINNING_THREADS, default_threads())


def forget_frames(error: BaseException | None) -> None:
    """Clears what the functions that an error went through still hold: views of memory to be freed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__


class Loader:
    """Fills parts chunk by chunk. A part is ready once ``finish`` was called for it.

    sizes_bytes: of the parts, in order. fill(part, begin, end): brings bytes of a part into memory; called
    from any thread. finish(part): called once all its bytes are there. end(): called when every part is
    ready. Whatever they raise is raised by ``wait``.
    """

    def __init__(
        self, sizes_bytes: Sequence[int], fill: Fill, finish: Finish, end: End, num_threads: int
    ) -> None:
        self._sizes, self._fill, self._finish, self._end = sizes_bytes, fill, finish, end
        self._left = [-(-size // CHUNK_BYTES) for size in sizes_bytes]
        self._ready = [False] * len(sizes_bytes)
        self._ready_bytes = 0
        self._error: KrasisError | None = None
        self._failed_part = 0
        self._stopping = False
        self._changed = threading.Condition()
        self._chunks = self._split()
        self._begin_s = time.perf_counter()
        self._end_s: float | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"krasis-load-{index}", daemon=True)
            for index in range(num_threads)
        ]

    def start(self) -> None:
        """Begins."""
        for thread in self._threads:
            thread.start()

    @property
    def num_threads(self) -> int:
        """Number of loading threads."""
        return len(self._threads)

    @property
    def seconds(self) -> float:
        """Since the beginning, until everything was ready or loading ended."""
        return (self._end_s or time.perf_counter()) - self._begin_s

    @property
    def finished(self) -> bool:
        """Whether every part is ready."""
        return all(self._ready)

    @property
    def is_over(self) -> bool:
        """Whether no more parts become ready: all are, or an error or ``stop`` ended it."""
        with self._changed:
            return self._stopping or self._error is not None or all(self._ready)

    def progress(self) -> tuple[int, int]:
        """(bytes of the parts that are ready, bytes of all)."""
        with self._changed:
            return self._ready_bytes, sum(self._sizes)

    def is_ready(self, part: int) -> bool:
        """Whether ``wait`` would not block."""
        return self._ready[part]

    def wait(self, part: int) -> None:
        """Blocks until a part is ready. Raises what stopped the loading before it, NativeError after
        ``stop``.
        """
        if self._ready[part]:
            return
        with self._changed:
            # Chunks are taken in order: what comes before a failure is still brought up by who took it.
            self._changed.wait_for(
                lambda: self._ready[part] or self._stopping or (self._error and part >= self._failed_part)
            )
            if self._ready[part]:
                return
            raise self._error or NativeError("the store of experts is closed", where="host memory")

    def stop(self) -> None:
        """Ends the loading; returns when no thread touches the memory any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        forget_frames(self._error)

    def _split(self) -> Iterator[tuple[int, int, int]]:
        for part, size in enumerate(self._sizes):
            for begin in range(0, size, CHUNK_BYTES):
                yield part, begin, min(begin + CHUNK_BYTES, size)

    def _run(self) -> None:
        done = False
        try:
            self._work()
            done = True
        finally:
            if not done:  # a bug; its traceback is printed by the thread's hook, and nobody waits for ever
                died = NativeError("a thread that loads experts ended unexpectedly", where="host memory")
                self._fail(died, 0)

    def _work(self) -> None:
        while (chunk := self._next()) is not None:
            try:
                self._load(*chunk)
            except KrasisError as error:
                self._fail(error, chunk[0])

    def _load(self, part: int, begin: int, end: int) -> None:
        self._fill(part, begin, end)
        with self._changed:
            self._left[part] -= 1
            is_last = self._left[part] == 0
        if is_last:
            self._finish(part)
            self._mark_ready(part)

    def _next(self) -> tuple[int, int, int] | None:
        with self._changed:
            if self._stopping or self._error is not None:
                return None
            return next(self._chunks, None)

    def _mark_ready(self, part: int) -> None:
        with self._changed:
            self._ready[part] = True
            self._ready_bytes += self._sizes[part]
            is_end = all(self._ready)
            if is_end:
                self._end_s = time.perf_counter()
            self._changed.notify_all()
        if is_end:
            self._end()

    def _fail(self, error: KrasisError, part: int) -> None:
        with self._changed:
            if self._error is None or part < self._failed_part:
                self._error, self._failed_part = error, part
                self._end_s = time.perf_counter()
            self._changed.notify_all()
