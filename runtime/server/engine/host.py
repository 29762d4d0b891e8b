"""The engine's side: does for a core what messages ask, and tells what comes of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, is_dataclass
from threading import Event as Flag
from threading import Thread
from typing import Any

from krasis.formats.errors import KrasisError, NativeError
from krasis.runtime.server.engine.channel import Channel
from krasis.runtime.server.engine.errors_told import told
from krasis.runtime.server.engine.records import Recipe, of_event, of_status, to_request
from krasis.runtime.serving.api import Event, Failed, Finished, Slots
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.failures import as_krasis
from krasis.runtime.serving.ticket import QueuedTicket

logger = logging.getLogger(__name__)

ORPHAN_S = 10.0  # for the step under way of an engine whose server has gone


class EngineHost:
    """Serves one channel. core: started. recipe: see ``records.to_request``. leave: ends the process of an
    engine whose server has gone, though a step is under way."""

    def __init__(
        self,
        core: EngineCore,
        slots: Slots | None,
        channel: Channel,
        recipe: Recipe,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._core, self._slots, self._channel, self._recipe = core, slots, channel, recipe
        self._leave = leave
        self._tickets: dict[int, QueuedTicket] = {}
        self._is_over = Flag()

    def serve(self) -> BaseException | None:
        """Returns when the core is closed: because it was told so, because whoever asks has gone, or by an
        error, which is given."""
        core, channel = self._core, self._channel
        channel.send(
            {
                "is": "ready",
                "context": core.context,
                "vocab_size": core.vocab_size,
                "description": core.description,
                "num_slots": core.settings.num_slots,
            }
        )
        watcher = Thread(target=self._watch, name="krasis-watch", daemon=True)
        watcher.start()
        while (message := channel.receive()) is not None:
            self._handle(*message)
        if not self._is_over.is_set():
            Thread(target=self._leave_soon, name="krasis-orphan", daemon=True).start()
            core.close(save_prefixes=True)
        watcher.join()
        return core.wait()

    def _watch(self) -> None:
        """When the core has ended, says so, and lets the reader end."""
        failure = self._core.wait()
        self._is_over.set()
        if failure is not None:
            self._channel.send({"is": "failed", "error": told(failure)})
        self._channel.finish()

    def _leave_soon(self) -> None:
        """The server has gone: nobody waits for a long step, and another server may want the memory."""
        if not self._is_over.wait(ORPHAN_S) and self._tickets:  # else it is saving prefixes
            self._leave(1)

    def _handle(self, head: dict[str, Any], data: bytes) -> None:
        kind = head.get("do")
        if kind == "submit":
            self._submit(head["number"], head["request"], data)
        elif kind == "cancel":
            ticket = self._tickets.get(head["number"])
            if ticket is not None:
                ticket.cancel()
        elif kind == "status":
            found = of_status(self._core.status())
            self._channel.send({"is": "done", "number": head["number"], "found": found})
        elif kind == "slot":
            self._act(head)
        elif kind == "close":
            # In a thread: figures are still asked for.
            Thread(target=self._core.close, args=(head["save"],), name="krasis-close", daemon=True).start()
        else:
            logger.error("the server asks for what is not known: %s", kind)

    def _submit(self, number: int, said: dict[str, Any], prompt: bytes) -> None:
        try:
            ticket = self._core.submit(to_request(said, prompt, self._recipe))
        except Exception as error:
            if not isinstance(error, KrasisError):
                logger.exception("a request cannot be taken on")
            self._tell(number, Failed(as_krasis(error)))  # whatever it is, it ends this request and no other
            return
        self._tickets[number] = ticket
        ticket.forward(self._teller(number))

    def _teller(self, number: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            self._tell(number, event)

        return tell

    def _tell(self, number: int, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            self._tickets.pop(number, None)
        self._channel.send({"is": "event", "number": number, "event": of_event(event)})

    def _act(self, head: dict[str, Any]) -> None:
        number, slots = head["number"], self._slots
        try:
            if slots is None:
                raise NativeError("this engine's slots cannot be acted on")
            found = _begun(slots, head["action"], *head["arguments"])
        except KrasisError as error:
            self._channel.send({"is": "done", "number": number, "error": told(error)})
            return
        found.add_done_callback(lambda future: self._done(number, future))

    def _done(self, number: int, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            self._channel.send({"is": "done", "number": number, "error": told(error)})
            return
        found = future.result()
        said = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
        self._channel.send({"is": "done", "number": number, "found": said})


def _begun(slots: Slots, action: str, number: int, name: str = "") -> Future[Any]:
    if action == "erase":
        return slots.erase(number)
    return slots.save(number, name) if action == "save" else slots.restore(number, name)
