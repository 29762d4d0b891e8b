"""The life of an engine's process as the server sees it: it is started, heard, lost and started again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

from krasis.formats.errors import KrasisError, NativeError, ResourceError
from krasis.runtime.server.engine.errors_told import heard
from krasis.runtime.server.engine.launch import Engine
from krasis.runtime.server.engine.requests import OpenRequests
from krasis.runtime.server.engine.restarts import Restarts
from krasis.runtime.server.engine.sums import Sums
from krasis.runtime.serving.api import CoreClosedError, EngineLostError
from krasis.runtime.serving.failures import as_krasis

logger = logging.getLogger(__name__)

_CLOSING = "the engine is closing"


@dataclass(frozen=True, slots=True)
class Ready:
    """What an engine says of itself when it takes requests."""

    context: int
    vocab_size: int
    description: str
    num_slots: int


class EngineLife:
    """Any thread may call. start: starts an engine; of the context that the one before it had, if there was
    one. restarts: None = an engine that is lost is the last.

    requests: what the engine was asked. sums: its figures.
    """

    def __init__(self, start: Callable[[int | None], Engine], restarts: Restarts | None = None) -> None:
        self.requests, self.sums = OpenRequests(), Sums()
        self._start, self._restarts = start, restarts
        self._changed = Condition()  # guards what follows
        self._engine: Engine | None = None
        self._ready: Ready | None = None  # of the last that was
        self._trouble: KrasisError | None = EngineLostError("the engine is starting")
        self._is_over = False
        self._is_closing = False
        self._failure: KrasisError | None = None
        self._saves = False

    @property
    def trouble(self) -> KrasisError | None:
        """See ``api.Core``."""
        return self._trouble

    @property
    def is_closing(self) -> bool:
        """Whether ``close`` was called, or the last engine was lost."""
        return self._is_closing

    @property
    def engine(self) -> Engine | None:
        """The last that was started."""
        return self._engine

    def begin(self) -> None:
        """Starts the first engine; returns before it is ready. Raises ResourceError."""
        engine = self._engine = self._start(None)
        Thread(target=self._live, args=(engine,), name="krasis-engine", daemon=True).start()

    def wait_ready(self) -> Ready:
        """Waits for the first engine. Raises what it ended by, CoreClosedError."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready is not None or self._is_over)
            if self._ready is None:
                raise self._failure or CoreClosedError(_CLOSING)
            return self._ready

    def wait(self) -> KrasisError | None:
        """Returns when there will be no engine any more: by what the last ended, None if by ``close``."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over)
        return self._failure

    def send(self, head: dict[str, Any], data: bytes = b"") -> bool:
        """Sends to the engine; False if there is none that would hear it."""
        with self._changed:
            if self._engine is None or isinstance(self._trouble, EngineLostError):
                return False
            self._engine.channel.send(head, data)
            return True

    def close(self, save_prefixes: bool = True) -> None:
        """Lets the engine end in order; one that is not ready yet ends at once. Returns when it has."""
        with self._changed:
            if not self._is_closing:
                self._is_closing, self._saves = True, save_prefixes
                engine, is_ready = self._engine, self._trouble is None
                self._trouble = CoreClosedError(_CLOSING)
                if engine is None:
                    self._is_over = True
                elif is_ready:
                    engine.channel.send({"do": "close", "save": save_prefixes})
                else:
                    engine.kill()
                self._changed.notify_all()
        self.wait()

    def _live(self, engine: Engine) -> None:
        """One engine after the other."""
        try:
            while True:
                failure = self._hear(engine)
                following = self._next(engine, failure)
                if following is None:
                    return
                engine = following
        except Exception as error:  # a fault of ours: the server ends by it
            logger.exception("what the engine says is not understood")
            engine.kill()
            self._failure = as_krasis(error)
        finally:
            with self._changed:
                self._is_closing = True
                self._trouble = CoreClosedError(_CLOSING)
            self.requests.fail_all(CoreClosedError(_CLOSING))
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _hear(self, engine: Engine) -> KrasisError | None:
        """Hears an engine to its end; gives the error by which it says it ends."""
        failure: KrasisError | None = None
        while (message := engine.channel.receive()) is not None:
            head, _ = message
            kind = head.pop("is")
            if kind == "event":
                self.requests.tell(head["number"], head["event"])
            elif kind == "done":
                self.requests.answer(head)
            elif kind == "ready":
                self._is_ready(Ready(**head))
            elif kind == "failed":
                failure = heard(head["error"])
            else:
                raise NativeError("the engine says what is not known", got=kind)
        return failure

    def _is_ready(self, ready: Ready) -> None:
        self.sums.begin(ready.num_slots)
        with self._changed:
            self._ready = ready
            if not self._is_closing:
                self._trouble = None
            self._changed.notify_all()

    def _next(self, engine: Engine, failure: KrasisError | None) -> Engine | None:
        """Ends what the engine that was lost had been asked, at once, and starts another. None: that was the
        last."""
        with self._changed:
            was_closing = self._is_closing
            if not was_closing:
                self._trouble = EngineLostError("the engine ended, and starts again")
        has_answered = self.requests.has_answered
        lost = EngineLostError("the engine ended while it worked on this request")
        self.sums.lose(self.requests.fail_all(CoreClosedError(_CLOSING) if was_closing else failure or lost))
        how = engine.ending() if failure is None else str(failure)
        engine.kill()
        if was_closing:
            return None
        if self._ready is None or self._restarts is None:
            self._failure = failure or _ended("the engine ended", how)
            return None
        return self._again(self._restarts, failure, how, has_answered=has_answered)

    def _again(
        self, restarts: Restarts, failure: KrasisError | None, how: str, *, has_answered: bool
    ) -> Engine | None:
        while (pause_s := restarts.next_pause_s(has_answered=has_answered)) is not None:
            logger.error("the engine ended (%s); it starts again, %s", how, restarts.shown)
            with self._changed:
                if not self._is_closing:
                    text = f"the engine ended ({how}) and starts again, {restarts.shown}"
                    self._trouble = EngineLostError(text, retry_after_s=pause_s + 1)
                    self._changed.wait_for(lambda: self._is_closing, pause_s)
                if self._is_closing:
                    return None
                context = None if self._ready is None else self._ready.context
            try:
                engine = self._start(context)
            except KrasisError as error:
                failure, how, has_answered = error, str(error), False
                continue
            self.sums.add(num_restarts=1)
            return self._adopted(engine)
        self._failure = failure or _ended("the engine ends again and again", how)
        return None

    def _adopted(self, engine: Engine) -> Engine:
        with self._changed:
            self._engine = engine
            if self._is_closing:  # whoever closes has not seen it
                engine.kill()
        return engine


def _ended(what: str, how: str) -> KrasisError:
    hint = "the system's log (dmesg) says whether memory ran out" if "SIGKILL" in how else ""
    return ResourceError(what, got=how, hint=hint)
