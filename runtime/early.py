"""Work that begins before its result is asked for."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Early(Generic[Result]):
    """Runs make in a thread of its own; ``result`` waits for it."""

    __slots__ = ("_error", "_made", "_thread")

    def __init__(self, make: Callable[[], Result]) -> None:
        self._made: list[Result] = []
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    def result(self) -> Result:
        """What make gave; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._made[0]

    def _run(self, make: Callable[[], Result]) -> None:
        try:
            self._made.append(make())
        except Exception as error:  # noqa: BLE001  it is raised where the result is asked for
            self._error = error
