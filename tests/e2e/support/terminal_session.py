"""A command that believes a person is typing: a pseudo-terminal around it, and what it shows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

RUN = [sys.executable, "-c", "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')"]
PROMPT = ">>> "
PATIENCE_S = float(os.environ.get("KRASIS_TEST_PATIENCE", "30"))
CTRL_C, CTRL_D, CTRL_Z, UP, TAB, ALT_ENTER = "\x03", "\x04", "\x1a", "\x1b[A", "\t", "\x1b\r"
PASTE = "\x1b[200~", "\x1b[201~"  # what a terminal puts around a paste, if it was asked to
_TO_BE_DRAWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")
_WITH_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def readable(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read, or the other side has gone, within that time. By poll: select takes
    no descriptor above 1,023, and a process of many tests has some."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * max(0.0, seconds)))


class Session:
    """A krasis-run on a terminal of so many rows and columns. home: where it keeps its history.

    ``raw`` is all it ever wrote; ``until`` looks at it without the sequences that draw.
    """

    def __init__(
        self,
        bundle: Path | str,
        *arguments: str,
        term: str = "xterm-256color",
        home: Path | None = None,
        size: tuple[int, int] = (50, 150),
        command: list[str] | None = None,
        **environment: str,
    ) -> None:
        self.master, slave = pty.openpty()
        self.resize(*size)
        state = {"XDG_STATE_HOME": str(home)} if home is not None else {}
        if home is None and "--no-history" not in arguments and command is None:
            arguments = (*arguments, "--no-history")
        # A session of its own with this terminal, so that Ctrl-C reaches it as it would from a keyboard.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WITH_TERMINAL, *(command or RUN), str(bundle), *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": term, "PYTHONUNBUFFERED": "1", **state, **environment},
        )
        os.close(slave)
        self.raw = b""
        self.unread = ""

    def resize(self, rows: int, columns: int) -> None:
        """Another size of the window, as its frame gives it."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str | bytes) -> None:
        """Presses keys."""
        os.write(self.master, text.encode() if isinstance(text, str) else text)

    def paste(self, text: str | bytes) -> None:
        """Pastes, as a terminal does in bracketed-paste mode: newlines become carriage returns."""
        data = text.encode() if isinstance(text, str) else text
        begin, end = PASTE
        self.type(begin.encode() + data.replace(b"\n", b"\r") + end.encode())

    def until(self, pattern: str, seconds: float = PATIENCE_S) -> str:
        """Everything up to and including what matches. Fails when it does not come in time."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.unread)):
            ready = readable(self.master, deadline - time.monotonic())
            if not ready:
                pytest.fail(f"waited for {pattern!r}, saw {self.unread[-2000:]!r}")
            if not self._read():
                pytest.fail(f"it ended before {pattern!r}: {self.unread[-2000:]!r}")
        text, self.unread = self.unread[: match.end()], self.unread[match.end() :]
        return text

    def _read(self) -> bool:
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the other side is gone
            data = b""
        self.raw += data
        text = _TO_BE_DRAWN.sub("", self.unread + data.decode("utf-8", "replace"))
        self.unread = re.sub("\r+\n", "\n", text)
        return bool(data)

    def command(self, line: str, answer: str) -> str:
        """Types a line and waits for an answer and the next prompt."""
        self.type(line + "\n")
        text = self.until(answer)
        self.until(re.escape(PROMPT))
        return text

    def interrupt_prompt(self) -> None:
        """Ctrl-C once the program waits for its terminal.

        Between showing the prompt and waiting, readline loses the wake-up of a signal: it is seen at the
        next key. A person is never that fast.
        """
        self.wait_until_idle()
        self.type(CTRL_C)

    def wait_until_idle(self) -> None:
        """Returns when the program has been asleep for a tenth of a second."""
        still = 0
        deadline = time.monotonic() + 20
        while still < 5 and time.monotonic() < deadline:
            still = still + 1 if self.state() == "S" else 0
            time.sleep(0.02)

    def state(self) -> str:
        """The kernel's letter for what the process does: R runs, S sleeps, T is stopped."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def echoes(self) -> bool:
        """Whether the terminal shows what is typed by itself."""
        return bool(termios.tcgetattr(self.master)[3] & termios.ECHO)

    def ended(self) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            ready = readable(self.master, 0.05)
            if ready:
                with contextlib.suppress(OSError):
                    self._read()
        code = self.process.poll()
        if code is None:
            pytest.fail(f"it did not end: {self.unread[-2000:]!r}")
        return code

    def close(self) -> None:
        """Ends it, whatever it does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        os.close(self.master)
