"""Work that other threads have for the core's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Orders:
    """A queue of work. Any thread may ``add``; one does it."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, work: Callable[[], T]) -> Future[T]:
        """Queues work; gives what it will give, or raise."""
        found: Future[T] = Future()

        def do() -> None:
            if found.set_running_or_notify_cancel():
                try:
                    found.set_result(work())
                except Exception as error:  # noqa: BLE001  it is the caller's
                    found.set_exception(error)

        self._waiting.append(do)
        return found

    def do_all(self) -> None:
        """Does what is queued."""
        while self._waiting:
            self._waiting.popleft()()
