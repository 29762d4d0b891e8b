"""SIGTERM and SIGHUP end a command as Ctrl-C does, in order, and its exit code says which it was (128 + n).

Whoever handles KeyboardInterrupt handles them: what an answer had so far is kept, a saved prefix is written,
a conversion can be continued. What is asked for twice is done once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec

_P = ParamSpec("_P")
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended

_received: signal.Signals | None = None


def received() -> signal.Signals | None:
    """The signal that asked this command to end; None if none did. A loop that goes on after Ctrl-C asks."""
    return _received


def check() -> None:
    """Raises KeyboardInterrupt if this command was asked to end.

    A loop that may last long asks at each step: Python drops an exception that a signal raises inside a
    finalizer or a weak reference's callback, and lets a running event loop swallow it.
    """
    if _received is not None:
        raise KeyboardInterrupt


def ends_in_order(program: str) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """Makes a command's function end in order at the signals. program: says so on standard error; empty for a
    command that says it itself when it is interrupted.

    A signal that is ignored (nohup) stays so. What the function does after the signal is its own matter; an
    exit code that speaks of an error is kept.
    """

    def decorate(function: Callable[_P, None]) -> Callable[_P, None]:
        @functools.wraps(function)
        def run(*arguments: _P.args, **options: _P.kwargs) -> None:
            code: object = 0
            with _handled():
                try:
                    function(*arguments, **options)
                except KeyboardInterrupt:
                    if _received is None:
                        raise
                except SystemExit as error:
                    code = error.code
                    if _received is None:
                        raise
                except OSError:
                    if _received is not signal.SIGHUP:  # else it wrote to the terminal a moment too late
                        raise
                except RuntimeError as error:  # click's Exit is one
                    code = getattr(error, "exit_code", None)
                    if _received is None or code is None:
                        raise
                if _received is None:
                    return
                if program:
                    print(f"{program}: stopped by {_received.name}", file=sys.stderr, flush=True)
                sys.exit(128 + _received if code in (0, None, INTERRUPTED) else code)  # type: ignore[arg-type]

        return run

    return decorate


@contextmanager
def _handled() -> Iterator[None]:
    global _received
    _received = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Once: a closed terminal may send both, one after the other, while a prefix is being saved."""
    global _received
    if _received is not None:
        return
    _received = signal.Signals(number)
    if number == signal.SIGHUP:
        _leave_terminal()
    # Where Ctrl-C is put off (work that other ranks share), so is this.
    interrupt = signal.getsignal(signal.SIGINT)
    if callable(interrupt):
        interrupt(signal.SIGINT, frame)
    else:
        raise KeyboardInterrupt


def _leave_terminal() -> None:
    """A terminal that has hung up refuses whatever is written: the last words go nowhere instead."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for fd in (1, 2):
            with contextlib.suppress(OSError):  # closed: nothing will be written either
                if stat.S_ISCHR(os.fstat(fd).st_mode):
                    os.dup2(null, fd)
    finally:
        os.close(null)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, Ctrl-C and the signals wait. They are forgotten if the block ends well: it was the last thing
    to do, and it is done. If it fails, the exit code may still be theirs. A second Ctrl-C does not wait.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, *_SIGNALS)
    pressed: list[int] = []
    before = {number: signal.getsignal(number) for number in numbers}

    def remember(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, remember)
    try:
        yield
    except BaseException:
        if pressed and pressed[0] != signal.SIGINT:
            _received = signal.Signals(pressed[0])
        raise
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
