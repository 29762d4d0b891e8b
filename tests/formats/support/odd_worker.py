"""A worker that does what a worker must not, for the tests of its owner."""

import os
import signal
import sys
import time
from pathlib import Path


def _say(payload: bytes) -> bytes:
    return payload


def _spin(_: bytes) -> bytes:
    while True:
        pass


def _grow(_: bytes) -> bytes:
    held = []
    while True:
        held.append(bytearray(1 << 20))


def _grow_in_c(_: bytes) -> bytes:
    return b"x" * (1 << 40)


def _sleep(payload: bytes) -> bytes:
    time.sleep(float(payload))
    return b"slept"


def _leave(_: bytes) -> bytes:
    os._exit(0)


def _die(payload: bytes) -> bytes:
    os.kill(os.getpid(), int(payload))
    time.sleep(10)
    return b""


def _gush(_: bytes) -> bytes:
    return bytes(40 << 20)


def _babble(_: bytes) -> bytes:
    os.write(1, b"\xff" * 1000)
    time.sleep(10)
    return b""


def _recurse(payload: bytes) -> bytes:
    return _recurse(payload)


def _panic(_: bytes) -> bytes:
    class PanicException(BaseException):
        pass

    raise PanicException("index out of bounds")


def _rude(_: bytes) -> bytes:
    raise ValueError("\x1b]0;owned\x07" * 100_000)


def _facts(_: bytes) -> bytes:
    files = sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    return repr((files, sorted(os.environ), str(Path.cwd()), os.getsid(0) == os.getpid())).encode()


def _interrupt(_: bytes) -> bytes:
    os.killpg(0, signal.SIGINT)
    return b"alive"


HANDLERS = {
    "say": _say,
    "spin": _spin,
    "grow": _grow,
    "grow_in_c": _grow_in_c,
    "sleep": _sleep,
    "leave": _leave,
    "die": _die,
    "gush": _gush,
    "babble": _babble,
    "recurse": _recurse,
    "panic": _panic,
    "rude": _rude,
    "facts": _facts,
    "interrupt": _interrupt,
    "exit": lambda _: sys.exit(3),
}
