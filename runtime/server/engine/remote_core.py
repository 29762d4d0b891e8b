"""The engine as the server sees it: a core whose computing is done by another process, which is started again
when it is lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from krasis.formats.errors import KrasisError
from krasis.runtime.server.engine.life import EngineLife
from krasis.runtime.server.engine.records import of_request, to_status
from krasis.runtime.serving.admission import check_request
from krasis.runtime.serving.api import CoreStatus, QueueFullError, Request, SlotFile
from krasis.runtime.serving.ticket import QueuedTicket

MAX_RETRY_AFTER_S = 120.0
STATUS_WAIT_S = 0.2  # an engine that is busy with one thing alone says nothing for longer


class RemoteCore:
    """See ``api.Core``, and ``api.Slots`` for what an operator does. Used when the engine is ready.

    max_waiting: requests that may wait for a slot. folder: of files of slots, None if there is none.
    check_text: raises UsageError for a request whose text cannot end as it says.
    """

    def __init__(
        self,
        life: EngineLife,
        *,
        max_waiting: int,
        folder: Path | None = None,
        check_text: Callable[[Request], object] = lambda _: None,
    ) -> None:
        ready = life.wait_ready()
        # They stay so: an engine that is started again has the same context.
        self.context, self.vocab_size, self.description = ready.context, ready.vocab_size, ready.description
        self.folder = folder
        self._life, self._max_waiting, self._check_text = life, max_waiting, check_text
        self._num_slots = ready.num_slots
        self._asked_status: Future[Any] | None = None

    def submit(self, request: Request) -> QueuedTicket:
        """See ``api.Core``."""
        requests = self._life.requests
        try:
            if (trouble := self.trouble()) is not None:
                raise trouble
            check_request(request, self.context, self.vocab_size, self._num_slots)
            if request.stops:
                self._check_text(request)
            self._refuse_if_full()
            said, prompt = of_request(request)
            number, ticket = requests.add(request.id, self._cancel)
        except KrasisError:
            self._life.sums.add(num_requests=1, num_refused=1)
            raise
        # One that was lost since then has ended what it knew of; this one was not told of it.
        if not self._life.send({"do": "submit", "number": number, "request": said}, prompt):
            requests.lose(number, self.trouble())
        return ticket

    def status(self) -> CoreStatus:
        """See ``api.Core``. An engine that does not answer soon is shown as it was."""
        sums = self._life.sums
        with suppress(TimeoutError, KrasisError):
            asked = self._asked_status
            if asked is None or asked.done():  # one question at a time, however many want to know
                asked = self._asked_status = self._ask({"do": "status"})
            sums.note(to_status(asked.result(STATUS_WAIT_S)))
        return sums.status(is_closing=self._life.is_closing)

    def trouble(self) -> KrasisError | None:
        """See ``api.Core``."""
        return self._life.trouble

    def close(self, save_prefixes: bool = True) -> None:
        """See ``api.Core``."""
        self._life.close(save_prefixes)

    def save(self, number: int, name: str) -> Future[SlotFile]:
        """See ``api.Slots``."""
        return self._act("save", number, name)

    def restore(self, number: int, name: str) -> Future[SlotFile]:
        """See ``api.Slots``."""
        return self._act("restore", number, name)

    def erase(self, number: int) -> Future[int]:
        """See ``api.Slots``."""
        return self._ask({"do": "slot", "action": "erase", "arguments": [number]})

    def _act(self, action: str, number: int, name: str) -> Future[SlotFile]:
        found: Future[SlotFile] = Future()
        found.set_running_or_notify_cancel()
        asked = self._ask({"do": "slot", "action": action, "arguments": [number, name]})
        asked.add_done_callback(partial(_as_file, found))
        return found

    def _ask(self, what: dict[str, Any]) -> Future[Any]:
        """What will hold the engine's answer. Raises what the trouble is."""
        number, future = self._life.requests.ask()
        if not self._life.send({**what, "number": number}):
            self._life.requests.forget(number)
            raise self.trouble() or KrasisError("the engine does not answer")
        return future

    def _cancel(self, number: int) -> None:
        self._life.send({"do": "cancel", "number": number})

    def _refuse_if_full(self) -> None:
        waiting = self._life.requests.num_open - self._num_slots
        if waiting >= self._max_waiting:
            raise QueueFullError(
                "too many requests wait already",
                retry_after_s=min(MAX_RETRY_AFTER_S, max(1.0, self._life.requests.mean_s * waiting)),
                got=waiting,
                limit=self._max_waiting,
            )


def _as_file(found: Future[SlotFile], asked: Future[Any]) -> None:
    if (error := asked.exception()) is not None:
        found.set_exception(error)
    else:
        found.set_result(SlotFile(**asked.result()))
