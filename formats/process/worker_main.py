"""The worker's side of ``worker_process``: takes requests from stdin, one at a time, each under limits.

Time: a timer of the process's CPU seconds, all threads together, whose signal ends the process. Memory: the
address space, counted from what the process held when it had loaded what it was asked to keep.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping

from krasis.formats.process.foreign import reason
from krasis.formats.process.worker_protocol import (
    ANSWER,
    DONE,
    KEEPING,
    MAX_REFUSAL_BYTES,
    OUT_OF_MEMORY,
    REFUSED,
    REQUEST,
)

Handler = Callable[[bytes], bytes]
_PAGE_BYTES = resource.getpagesize()
_UNKNOWN_HELD_BYTES = 1 << 30


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answers until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.closerange(3, 4096)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    held = _held_bytes()
    while head := _read(REQUEST.size):
        name, cpu_s, memory_bytes, num_bytes = REQUEST.unpack(head)
        operation = name.rstrip(b"\0").decode()
        limit = held + memory_bytes
        if most != resource.RLIM_INFINITY:
            limit = min(limit, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        status, answer = _answer(handlers[operation], num_bytes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if operation.startswith(KEEPING) and status == DONE:
            held = max(held, _held_bytes())
        _write(ANSWER.pack(status, len(answer)))
        _write(answer)


def _answer(handler: Handler, num_bytes: int) -> tuple[int, bytes]:
    try:
        return DONE, handler(_read(num_bytes))
    except MemoryError:
        return OUT_OF_MEMORY, b""
    except BaseException as error:  # noqa: BLE001  a panic of a Rust library is no Exception
        return REFUSED, reason(error)[:2000].encode("utf-8", "backslashreplace")[:MAX_REFUSAL_BYTES]


def _read(num_bytes: int) -> bytes:
    """Exactly so many bytes; empty at the end of the pipe."""
    data = bytearray()
    while len(data) < num_bytes:
        part = os.read(0, min(1 << 20, num_bytes - len(data)))
        if not part:
            if data:
                sys.exit(1)
            break
        data += part
    return bytes(data)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view[: 1 << 20]) :]


def _held_bytes() -> int:
    """The address space in use."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  pathlib takes 6 ms to import
            return int(file.read().split()[0]) * _PAGE_BYTES
    except (OSError, ValueError):  # no /proc: the limits are looser by what a Python needs
        return _UNKNOWN_HELD_BYTES
