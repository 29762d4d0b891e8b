"""A request's way back to its reader: events from the core's thread to another thread or an asyncio loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from threading import Condition

from krasis.runtime.serving.api import Event, Failed, Finished, Progress


class QueuedTicket:
    """See ``api.Ticket``. on_cancel: what tells the core; called once, in the thread that cancels."""

    __slots__ = ("_changed", "_events", "_is_cancelled", "_is_over", "_on_cancel", "_sink", "_wake", "id")

    def __init__(self, name: str, on_cancel: Callable[[], None]) -> None:
        self.id = name
        self._on_cancel = on_cancel
        self._events: deque[Event] = deque()
        self._changed = Condition()
        self._wake: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._is_cancelled = self._is_over = False
        self._sink: Callable[[Event], None] | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._is_cancelled

    def put(self, event: Event) -> None:
        """One more event, unless the last one has been. Unread progress, but for the first, is overtaken by
        newer progress."""
        with self._changed:
            if self._is_over:
                return
            self._is_over = isinstance(event, Finished | Failed)
            if self._sink is not None:
                self._sink(event)
                return
            last = self._events[-1] if self._events else None
            if isinstance(event, Progress) and isinstance(last, Progress) and not _is_first(last):
                self._events[-1] = event
                return
            self._events.append(event)
            self._changed.notify()
            wake, self._wake = self._wake, None
        if wake is not None:
            loop, flag = wake
            try:
                loop.call_soon_threadsafe(flag.set)
            except RuntimeError:  # the reader's loop is gone, and with it the reader
                self.cancel()

    def forward(self, sink: Callable[[Event], None]) -> None:
        """Instead of being read, events are given to sink: those so far at once, others in the thread that
        makes them. It must not wait."""
        with self._changed:
            while self._events:
                sink(self._events.popleft())
            self._sink = sink

    def cancel(self) -> None:
        """See ``api.Ticket``."""
        with self._changed:
            if self._is_cancelled or self._is_over:
                return
            self._is_cancelled = True
        self._on_cancel()

    def events(self, timeout_s: float | None = None) -> Iterator[Event]:
        """See ``api.Ticket``."""
        while True:
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            with self._changed:
                while not self._events:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise TimeoutError(f"no event of {self.id} within {timeout_s} s")
                    self._changed.wait(left)
                event = self._events.popleft()
            yield event
            if isinstance(event, Finished | Failed):
                return

    async def async_events(self) -> AsyncIterator[Event]:
        """See ``api.Ticket``."""
        loop, flag = asyncio.get_running_loop(), asyncio.Event()
        while True:
            with self._changed:
                event = self._events.popleft() if self._events else None
                if event is None:
                    flag.clear()
                    self._wake = (loop, flag)
            if event is None:
                await flag.wait()
                continue
            yield event
            if isinstance(event, Finished | Failed):
                return


def _is_first(progress: Progress) -> bool:
    """Whether it says what was found before anything was computed."""
    return progress.num_processed == progress.num_cached
