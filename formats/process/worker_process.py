"""A process of our own that does what a file of a stranger asks for, bounded from outside in time and memory.

A chat template is a program, a tokenizer nearly one, and an HDF5 file is read by a large C library: counting
their steps from inside leaves out whatever one did not think of. A worker runs them under the system's own
limits instead. It is a fresh Python that imports little (no fork: this process may have threads, CUDA and
terabytes mapped), has none of this process's files, and talks over two pipes only (``worker_protocol``).

Nothing that it answers is trusted: sizes are bounded, and there is a deadline. It ends when its pipe closes,
so with this process however that ends, and each request is limited, so it cannot outlive it working. It is
in a session of its own: Ctrl-C at the terminal does not reach it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from krasis.formats.errors import ResourceError
from krasis.formats.process.worker_protocol import (
    ANSWER,
    DONE,
    MAX_REFUSAL_BYTES,
    OUT_OF_MEMORY,
    REFUSED,
    REQUEST,
)

# A worker's processor time is limited by the kernel. The clock only ends what waits: a stopped process, a
# machine that swaps. Generous, because a busy machine must not fail an honest file.
DEADLINE_S = 60.0
_READ_BYTES = 1 << 20
_KEPT_VARIABLES = ("TZ", "LANG", "LC_ALL", "LC_TIME", "LD_LIBRARY_PATH", "HDF5_USE_FILE_LOCKING")
_SETTINGS = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# krasis.* is found where this process found it, also where an import hook of an editable install did.
_BOOT = """\
import gc, sys, types
gc.disable()  # nothing that is imported is garbage
sys.path[:] = {path!r}
for name, places in {packages!r}.items():
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = places
from {module} import HANDLERS
from krasis.formats.process.worker_main import serve
gc.enable()
serve(HANDLERS)
"""


class WorkerRefusal(Exception):  # noqa: N818  it is an answer, no error of the worker
    """The worker's sentence about what it was given."""


class WorkerLost(Exception):  # noqa: N818  it says what happened to the process
    """The worker is gone, with the reason in a few words: a limit was met, or it crashed."""


class WorkerProcess:
    """One worker, of one caller at a time. module: whose HANDLERS it serves, such as
    ``krasis.runtime.text.worker``.

    The constructor returns before the worker is ready. Raises ResourceError if the system starts no process.
    """

    __slots__ = ("_answers", "_process", "_requests")

    def __init__(self, module: str) -> None:
        theirs: list[int] = []
        ours: list[int] = []
        try:
            for end in (1, 0):
                pair = [_above_standard(fd) for fd in os.pipe()]
                ours.append(pair[end])
                theirs.append(pair[1 - end])
                os.set_blocking(ours[-1], False)
            self._requests, self._answers = ours
            self._process = _start(module, *theirs)
        except OSError as error:
            for fd in ours:
                os.close(fd)
            raise ResourceError(
                "no worker process can be started to read the bundle's text files safely",
                got=error.strerror or error,
                hint="raise the limit on processes (ulimit -u, the container's pids limit) or on memory",
            ) from error
        finally:
            for fd in theirs:
                os.close(fd)

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def call(
        self, operation: str, payload: bytes, *, cpu_s: float, memory_bytes: int, max_answer_bytes: int
    ) -> bytes:
        """The answer to one request. cpu_s, memory_bytes: what the worker may spend on it, memory beyond what
        it already holds.

        Raises WorkerRefusal, or WorkerLost: then the worker has been ended. An interrupt ends it, too: its
        answer would be taken for the next one's.
        """
        deadline = time.monotonic() + DEADLINE_S
        head = REQUEST.pack(operation.encode(), cpu_s, memory_bytes, len(payload))
        try:
            self._send(head + payload, deadline)
            status, num_bytes = ANSWER.unpack(self._receive(ANSWER.size, deadline))
            if num_bytes > (max_answer_bytes if status == DONE else MAX_REFUSAL_BYTES):
                raise WorkerLost(f"its answer has {num_bytes} bytes")
            answer = self._receive(num_bytes, deadline)
        except WorkerLost:
            self.close()
            raise
        except (OSError, EOFError) as error:
            raise WorkerLost(self._ending(cpu_s)) from error
        except BaseException:
            self.close()
            raise
        if status == DONE:
            return bytes(answer)
        if status == OUT_OF_MEMORY:
            self.close()  # what it still holds of the attempt is unknown
            raise WorkerLost(f"it needs more than {memory_bytes >> 20} MiB of memory")
        if status != REFUSED:
            self.close()
            raise WorkerLost("its answer is garbage")
        raise WorkerRefusal(answer.decode("utf-8", "replace"))

    def close(self) -> None:
        """Ends it at once. Calling it again does nothing."""
        self._close_pipes()
        self.end()

    def end(self) -> None:
        """Ends it at once, whatever another thread asks it just now: that one meets the end of the pipe."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """After a fork, in the child: lets go of the parent's worker without ending it."""
        self._close_pipes()
        self._process.returncode = 0  # not ours to wait for

    def _close_pipes(self) -> None:
        for name in ("_requests", "_answers"):
            if (fd := getattr(self, name)) >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            if self._answers in _wait(
                {self._requests: select.POLLOUT, self._answers: select.POLLIN}, deadline
            ):
                return  # it has refused or ended before it heard all
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self._requests, view[:_READ_BYTES]) :]

    def _receive(self, num_bytes: int, deadline: float) -> bytearray:
        data = bytearray()
        while len(data) < num_bytes:
            _wait({self._answers: select.POLLIN}, deadline)
            with contextlib.suppress(BlockingIOError):
                part = os.read(self._answers, min(_READ_BYTES, num_bytes - len(data)))
                if not part:
                    raise EOFError
                data += part
        return data

    def _ending(self, cpu_s: float) -> str:
        """How a worker ended whose pipe is closed."""
        self._close_pipes()
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self.close()
            return "it closed its pipe"
        if code in (-signal.SIGPROF, -signal.SIGXCPU):
            return f"it takes more than {cpu_s:.2g} s"
        if code == -signal.SIGABRT:
            return "it needs too much memory, or ended itself"
        if code < 0:
            return f"it crashes ({signal.Signals(-code).name})" if -code in _SIGNALS else "it crashes"
        return f"it ends by itself (code {code})"


_SIGNALS = frozenset(signal.valid_signals()) & frozenset(signal.Signals)


def _start(module: str, requests: int, answers: int) -> subprocess.Popen[bytes]:
    packages = {"krasis": [""]}
    for name in ("krasis.formats", "krasis.convert", "krasis.runtime"):
        if name in sys.modules:
            packages[name] = [str(Path(place).absolute()) for place in sys.modules[name].__path__]
    path = [one for one in sys.path if Path(one).is_absolute()]
    boot = _BOOT.format(path=path, packages=packages, module=module)
    if not sys.executable:
        raise FileNotFoundError(2, "this program does not know its Python interpreter")
    return subprocess.Popen(  # noqa: S603  our own interpreter and our own text
        # -I, -S: nothing of the user's environment and folders is imported.
        [sys.executable, "-I", "-S", "-c", boot],
        stdin=requests,
        stdout=answers,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ} | _SETTINGS,
        start_new_session=True,
    )


def _above_standard(fd: int) -> int:
    """fd, moved behind stdin, stdout and stderr if one of these is closed: nobody must write to it by
    mistake."""
    if fd > 2:
        return fd
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


def _wait(awaited: dict[int, int], deadline: float) -> set[int]:
    """The descriptors on which what is awaited has happened, or whose other end is closed."""
    poll = select.poll()
    for fd, events in awaited.items():
        poll.register(fd, events)
    ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if not ready:
        raise WorkerLost(f"it gives no answer in {DEADLINE_S:.0f} s")
    return {fd for fd, _ in ready}
