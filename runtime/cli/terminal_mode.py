"""The terminal while a chat is not asking: what is typed waits, unseen, for the next prompt."""

from __future__ import annotations

import os
import signal
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

_PASTES_MARKED, _PASTES_PLAIN = "\x1b[?2004h", "\x1b[?2004l"  # bracketed-paste mode
_LOCAL = 3  # termios.tcgetattr's list: the place of the local modes


class TerminalMode:
    """Keys pressed during an answer do not scramble it and are not lost or cut (a line the kernel edits holds
    4,095 bytes), and a paste stays one; Ctrl-C and Ctrl-Z work as ever.

    descriptor: of the terminal's keys. screen: where it takes its orders.
    """

    def __init__(self, descriptor: int, screen: TextIO) -> None:
        self._descriptor, self._screen = descriptor, screen
        self._before = termios.tcgetattr(descriptor)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Sets the mode, and the user's own again at the end and while the program is suspended."""
        handler = signal.getsignal(signal.SIGTSTP)
        if handler is signal.SIG_DFL:  # else nobody would continue us: a shell without job control
            signal.signal(signal.SIGTSTP, self._suspend)
        self.hush()
        try:
            yield
        finally:
            self._set(self._before)
            self._order(_PASTES_PLAIN)
            signal.signal(signal.SIGTSTP, handler)

    def hush(self) -> None:
        """Sets the mode (again)."""
        attributes = self._get()
        if attributes is not None:
            attributes[_LOCAL] &= ~(termios.ECHO | termios.ICANON)
            attributes[_LOCAL] |= termios.ISIG
            self._set(attributes)
            self._order(_PASTES_MARKED)

    def _suspend(self, _: int, __: FrameType | None) -> None:
        """SIGTSTP: the shell gets its terminal as it was, and we ours when we go on."""
        held = self._get()
        self._set(self._before)
        self._order(_PASTES_PLAIN)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns when somebody continues us
        signal.signal(signal.SIGTSTP, self._suspend)
        if held is not None:
            self._set(held)
            self._order(_PASTES_MARKED)

    def _order(self, sequence: str) -> None:
        with suppress(OSError):  # the terminal is gone: the next read says so
            self._screen.write(sequence)
            self._screen.flush()

    def _get(self) -> list[Any] | None:
        with suppress(termios.error):  # the terminal is gone: the next read says so
            return termios.tcgetattr(self._descriptor)
        return None

    def _set(self, attributes: list[Any]) -> None:
        with suppress(OSError, termios.error):
            # In the background this would stop us: the terminal is another's then.
            if os.tcgetpgrp(self._descriptor) == os.getpgrp():
                termios.tcsetattr(self._descriptor, termios.TCSANOW, attributes)
