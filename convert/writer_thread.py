"""A thread that writes and hashes packed data while the next is being packed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from krasis.formats.bundle.writer import BlobSink
from krasis.formats.files.aligned import aligned_empty

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Write:
    sink: BlobSink
    data: Bytes
    release: Callable[[], None] | None


class StagingRing:
    """Reusable record buffers, aligned for direct writes.

    ``take`` waits for a free one; give it back with ``release``.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for _ in range(num_slots):
            self._free.put(aligned_empty(slot_bytes))

    def take(self, thread: WriterThread) -> Bytes:
        """A free buffer. Raises what the writer thread met, instead of waiting for ever."""
        while True:
            thread.raise_failure()
            try:
                return self._free.get(timeout=0.5)
            except queue.Empty:
                continue

    def release(self, buffer: Bytes) -> None:
        """Makes a buffer free again."""
        self._free.put(buffer)


class WriterThread:
    """Writes in the order given. The first error stops it and is raised in the caller at the next call."""

    def __init__(self, max_queued: int = 4) -> None:
        self._queue: queue.Queue[_Write | None] = queue.Queue(max_queued)
        self._failure: BaseException | None = None
        self._discard = False
        self._thread = threading.Thread(target=self._run, name="krasis-writer", daemon=True)
        self._thread.start()

    def write(self, sink: BlobSink, data: Bytes, release: Callable[[], None] | None = None) -> None:
        """Queues ``data`` for ``sink``.

        It must stay unchanged until ``release`` is called (or ``flush`` returns).
        """
        self.raise_failure()
        self._queue.put(_Write(sink, data, release))

    def flush(self) -> None:
        """Waits until everything queued is written. Raises what the thread met."""
        self._queue.join()
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raises the thread's error, if it met one."""
        if self._failure is not None:
            raise self._failure

    def close(self, *, discard: bool = False) -> None:
        """Ends the thread; what is still queued is written unless it failed, or is dropped. Never raises."""
        self._discard = discard
        self._queue.put(None)
        self._thread.join()

    def __enter__(self) -> WriterThread:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(discard=kind is not None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._failure is None and not self._discard:
                    item.sink.write(item.data)
            except BaseException as error:  # noqa: BLE001 -- raised again in the calling thread
                self._failure = error
            finally:
                if item.release is not None:
                    item.release()
                self._queue.task_done()
        self._queue.task_done()
