"""One caller at a time: an engine's lock, the count of its changes, and the way to tell a call to end.

An engine has one cache, so its calls take turns, in the order they came. A call that wants to know whether it
was overtaken since its last turn compares ``num_changes``. Nothing here is left locked by an exception, not
even by a KeyboardInterrupt between two instructions: hence ``run`` is one function and no context manager.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import NoReturn, ParamSpec, TypeVar

from krasis.formats.errors import KrasisError, UsageError

POLL_S = 0.05  # how long a waiting call may take to see that it was cancelled

_P = ParamSpec("_P")
_T = TypeVar("_T")

_Bell = queue.SimpleQueue[None]  # not threading.Condition: an interrupt breaks its wait
_num_forks = 0  # between this process and the one that imported this module


def _note_fork() -> None:
    global _num_forks
    _num_forks += 1


os.register_at_fork(after_in_child=_note_fork)


class CallCancelledError(KrasisError):
    """``Engine.cancel`` ended the call; whole passes computed before it are held."""

    exit_code = 130  # as for Ctrl-C


class Cancellation:
    """Tells one call to end. Takes no lock, so any thread, callback or signal handler may ask.

    reason: empty while nobody has asked; of several who ask the first counts.
    """

    __slots__ = ("reason",)

    def __init__(self) -> None:
        self.reason = ""

    def cancel(self, reason: str = "cancelled") -> None:
        """Asks the call to end; does not wait for it."""
        if not self.reason:
            self.reason = reason

    def check(self) -> None:
        """Raises CallCancelledError if the call shall end."""
        if self.reason:
            raise CallCancelledError("the call was cancelled")


class Exclusive:
    """Lets calls in one by one, and none any more after ``close``.

    num_changes: how often calls changed what they share; to be changed inside ``run``. It belongs to the
    process that made it: a child of ``fork`` has none of the threads that do the work.
    """

    __slots__ = ("_closing", "_current", "_forks", "_line", "_lock", "_owner", "_pid", "num_changes")

    def __init__(self) -> None:
        self.num_changes = 0
        self._pid, self._forks = os.getpid(), _num_forks
        self._closing = False
        # Held for moments only, to look at what follows; by a signal's handler perhaps twice.
        self._lock = threading.RLock()
        self._owner: int | None = None  # the thread whose call is in
        self._line: deque[_Bell] = deque()  # of the threads that wait for their turn
        self._current: Cancellation | None = None  # of the call that is in, or of the last answer

    @property
    def is_inherited(self) -> bool:
        """Whether this process got it by ``fork``."""
        return self._forks != _num_forks

    def check(self) -> None:
        """Raises UsageError if it was closed, or inherited from a parent process."""
        if self._forks != _num_forks:
            raise UsageError(
                "the engine belongs to the process that opened it, and this is a child of it",
                got=f"process {os.getpid()}",
                limit=f"process {self._pid}",
                hint='open the bundle in the child, or start the child by the method "spawn"',
            )
        if self._closing:
            raise UsageError("the engine is closed", hint="open the bundle again")

    def run(
        self,
        cancellation: Cancellation | None,
        work: Callable[_P, _T],
        /,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """work(...), alone. cancellation: what ``cancel`` tells to end.

        Raises UsageError as ``check``, and if this thread is inside already (a callback that calls the
        engine); CallCancelledError if cancelled while waiting.
        """
        if self._closing or self._forks != _num_forks:
            self.check()
        here = get_ident()
        if self._owner == here:
            self._refuse_to_nest()
        try:
            with self._lock:
                if self._owner is None and not self._line:
                    self._owner = here
            if self._owner != here:
                self._wait(here, cancellation)
            if cancellation is not None:
                self._current = cancellation
            if self._closing:  # after _current is set: whoever closes sees it, or is seen here
                self.check()
            return work(*args, **kwargs)
        finally:
            # No call before the store: an interrupt must find no place to keep the others out for ever.
            if self._owner == here:
                self._owner = None
                if self._line:
                    self._wake()

    def cancel(self) -> None:
        """Tells the call that is in, or the answer that had the last turn, to end; does not wait for it."""
        current = self._current
        if current is not None:
            current.cancel()

    def close(self, free: Callable[[], None]) -> None:
        """Lets no call in any more, ends the one that is in, and when it has left, calls free.

        free must bear to be called again. In a child of ``fork`` it is not called. Raises UsageError inside a
        call of this thread.
        """
        if self.is_inherited:
            self._closing = True
            return
        here = get_ident()
        if self._owner == here:
            self._refuse_to_nest()
        self._closing = True
        current = self._current
        if current is not None:
            current.cancel("closed")
        try:
            with self._lock:
                if self._owner is None and not self._line:
                    self._owner = here
            if self._owner != here:
                self._wait(here, None)
            free()
        finally:
            if self._owner == here:
                self._owner = None
                if self._line:
                    self._wake()

    def _refuse_to_nest(self) -> NoReturn:
        raise UsageError(
            "the engine is in the middle of a call of this very thread",
            hint="a callback may call cancel(), and everything else when the call has returned",
        )

    def _wait(self, here: int, cancellation: Cancellation | None) -> None:
        """Returns when it is this thread's turn."""
        bell = _Bell()
        try:
            with self._lock:
                self._line.append(bell)
            while True:
                with self._lock:
                    if self._owner is None and self._line[0] is bell:
                        self._owner = here
                        return
                if cancellation is not None:
                    cancellation.check()
                try:
                    bell.get(timeout=POLL_S)
                except queue.Empty:
                    continue
        finally:
            with self._lock:
                if bell in self._line:
                    self._line.remove(bell)

    def _wake(self) -> None:
        with self._lock:
            if self._line:
                self._line[0].put(None)


class Claim:
    """An answer's hold on what the calls share, from one piece to the next; lost when another call changes
    it. To be used inside ``Exclusive.run``.
    """

    __slots__ = ("_gate", "_seen")

    def __init__(self, gate: Exclusive) -> None:
        self._gate = gate
        self._seen = 0

    def begin(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """work(...); what it leaves is claimed."""
        result = work(*args, **kwargs)
        self._seen = self._gate.num_changes
        return result

    def go_on(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """As ``begin``, but raises UsageError if another call changed what was left."""
        if self._gate.num_changes != self._seen:
            raise UsageError(
                "this answer cannot go on: another call has changed what the engine holds",
                hint="read an answer to its end before the next call; an engine holds one conversation",
            )
        result = work(*args, **kwargs)
        self._seen = self._gate.num_changes
        return result
