"""What a server has asked its engine and waits for: requests under way, and questions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from threading import Lock
from typing import Any

from krasis.formats.errors import KrasisError
from krasis.runtime.server.engine.errors_told import heard
from krasis.runtime.server.engine.records import to_event
from krasis.runtime.serving.api import EngineLostError, Event, Failed, Finished
from krasis.runtime.serving.ticket import QueuedTicket

_SMOOTHING = 0.9


class OpenRequests:
    """Any thread may call. mean_s: how long requests took of late."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._number = 0
        self._tickets: dict[int, QueuedTicket] = {}
        self._asked: dict[int, Future[Any]] = {}
        self.mean_s = 1.0
        self.has_answered = False  # since the last ``fail_all``

    @property
    def num_open(self) -> int:
        """Requests that have not ended, and that somebody waits for."""
        with self._lock:
            return sum(1 for one in self._tickets.values() if not one.is_cancelled)

    def add(self, name: str, on_cancel: Callable[[int], None]) -> tuple[int, QueuedTicket]:
        """A new request's number and ticket. on_cancel: called with the number."""
        with self._lock:
            self._number += 1
            number = self._number
            ticket = self._tickets[number] = QueuedTicket(name, lambda: on_cancel(number))
        return number, ticket

    def ask(self) -> tuple[int, Future[Any]]:
        """A new question's number, and what will hold its answer."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # whoever gives up waiting does not take it back
        with self._lock:
            self._number += 1
            self._asked[self._number] = future
            return self._number, future

    def tell(self, number: int, said: list[Any]) -> None:
        """An event of a request."""
        event: Event = to_event(said)
        is_last = isinstance(event, Finished | Failed)
        with self._lock:
            ticket = self._tickets.pop(number, None) if is_last else self._tickets.get(number)
            if isinstance(event, Finished):
                self.has_answered = True
                took_s = event.timings.time_to_first_token_s + event.timings.decode_s
                self.mean_s = _SMOOTHING * self.mean_s + (1 - _SMOOTHING) * took_s
        if ticket is not None:
            ticket.put(event)

    def answer(self, head: dict[str, Any]) -> None:
        """The answer to a question."""
        with self._lock:
            future = self._asked.pop(head["number"], None)
        if future is None:
            return
        with suppress(InvalidStateError):
            if "error" in head:
                future.set_exception(heard(head["error"]))
            else:
                future.set_result(head["found"])

    def lose(self, number: int, error: KrasisError | None) -> None:
        """Ends one request that the engine was not told of, if it has not ended."""
        with self._lock:
            ticket = self._tickets.pop(number, None)
        if ticket is not None:
            ticket.put(Failed(error or EngineLostError("the engine ended before it heard of this request")))

    def forget(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        with self._lock:
            self._asked.pop(number, None)

    def fail_all(self, error: KrasisError) -> int:
        """Ends all there is; gives how many requests there were."""
        with self._lock:
            tickets, self._tickets = self._tickets, {}
            asked, self._asked = self._asked, {}
            self.has_answered = False
        for ticket in tickets.values():
            ticket.put(Failed(error))
        for future in asked.values():
            with suppress(InvalidStateError):
                future.set_exception(error)
        return len(tickets)
