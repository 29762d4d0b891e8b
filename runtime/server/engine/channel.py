"""Messages between the server and its engine, over a pair of sockets: JSON, and bytes beside it.

Neither side ever waits for the other: what is sent is queued, and a thread writes as much of it at once as
there is, so that the tokens of a step travel together.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections import deque
from contextlib import suppress
from threading import Condition, Thread
from typing import Any

from krasis.formats.errors import NativeError

Head = dict[str, Any]

_SIZES = struct.Struct(">QQ")  # bytes of the JSON, bytes beside it
MAX_BYTES = 2**32  # of either; the log probabilities of a long prompt are hundreds of megabytes
_READ_BYTES = 2**18


class Channel:
    """One end. Any thread may ``send``; one reads."""

    def __init__(self, end: socket.socket, name: str) -> None:
        self._socket = end
        self._file = end.makefile("rb", buffering=_READ_BYTES)
        self._changed = Condition()
        self._waiting: deque[bytes] = deque()
        self._is_closed = False
        self._writer = Thread(target=self._write, name=f"krasis-{name}", daemon=True)
        self._writer.start()

    def send(self, head: Head, data: bytes = b"") -> None:
        """Queues a message. What is sent to a side that has gone is lost."""
        text = json.dumps(head, separators=(",", ":")).encode("ascii")
        with self._changed:
            if not self._is_closed:
                self._waiting.append(_SIZES.pack(len(text), len(data)) + text + data)
                self._changed.notify()

    def receive(self) -> tuple[Head, bytes] | None:
        """The next message; None when the other side has gone. Raises NativeError for what is none."""
        try:
            sizes = self._file.read(_SIZES.size)
            if len(sizes) < _SIZES.size:
                return None
            num_text, num_data = _SIZES.unpack(sizes)
            if max(num_text, num_data) > MAX_BYTES:
                raise NativeError("a message of the engine is too long", got=num_text, limit=MAX_BYTES)
            text, data = self._file.read(num_text), self._file.read(num_data)
        except (OSError, ValueError):  # closed, here or there
            return None
        if len(text) < num_text or len(data) < num_data:
            return None
        try:
            head = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise NativeError("a message of the engine is no JSON", got=error) from error
        if not isinstance(head, dict):
            raise NativeError("a message of the engine is no object", got=type(head).__name__)
        return head, data

    def wait_until_left(self) -> None:
        """Returns when the other side has gone, whatever it has said before."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        poll.poll()

    def finish(self) -> None:
        """Writes what is queued, and closes. Twice is once."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._writer.join()
        self.abandon()

    def abandon(self) -> None:
        """Closes at once; whoever reads at either side meets the end."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._socket.close()

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                data = b"".join(self._waiting)
                self._waiting.clear()
                if not data:
                    return
            try:
                self._socket.sendall(data)
            except OSError:
                with self._changed:  # the other side has gone: its reader says so
                    self._is_closed = True
                    self._waiting.clear()
                return
