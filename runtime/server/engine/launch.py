"""Starts an engine's process. It is a fresh Python: this one has threads, which no fork survives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from krasis.formats.errors import ResourceError
from krasis.runtime.distributed.launcher import JOIN, is_launched_rank
from krasis.runtime.server.engine.channel import Channel

# krasis.* is found where this process found it.
_BOOT = "import sys; sys.path[:] = {path!r}; from {program} import main; main({end})"
PROGRAM = "krasis.runtime.server.engine.child"
_LEAVE_S = 5.0  # after its channel has closed


class Engine(Protocol):
    """One engine, wherever it runs."""

    channel: Channel

    def ending(self) -> str:
        """How it ended, in words. Called when its channel is closed; it is ended if it does not by itself."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...


class Order(Protocol):
    """What an engine is told to open."""

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON."""
        ...


class EngineProcess:
    """See ``Engine``. It imports what it needs, and waits for ``open``. program: the module whose ``main`` it
    runs, with the descriptor of its end of the channel. Raises ResourceError if the system starts no process.
    """

    def __init__(self, program: str = PROGRAM) -> None:
        ours, theirs = socket.socketpair()
        path = [one for one in sys.path if Path(one).is_absolute()]
        flags = ["-O"] if sys.flags.optimize else []
        boot = _BOOT.format(path=path, program=program, end=theirs.fileno())
        # The job is this process's, and a launcher looks for us by our parent.
        launched = {JOIN: "1"} if is_launched_rank() else {}
        try:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and our own text
                [sys.executable, *flags, "-P", "-c", boot],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **launched},
            )
        except OSError as error:
            ours.close()
            raise ResourceError(
                "the engine's process cannot be started",
                got=error.strerror or error,
                hint="raise the limit on processes (ulimit -u, the container's pids limit) or on memory",
            ) from error
        finally:
            theirs.close()
        self.channel = Channel(ours, "orders")

    def open(self, order: Order) -> EngineProcess:
        """Tells it what to open; gives itself."""
        self.channel.send(order.to_json())
        return self

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ending(self) -> str:
        """See ``Engine``."""
        try:
            code = self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return "it closed its channel"
        if code >= 0:
            return f"exit code {code}"
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"

    def kill(self) -> None:
        """See ``Engine``."""
        self._process.kill()
        self._process.wait()
        self.channel.abandon()
