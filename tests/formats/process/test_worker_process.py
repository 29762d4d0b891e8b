"""A worker is bounded whatever it does, and its owner always comes back with a reason."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from krasis.formats.errors import ResourceError
from krasis.formats.process import worker_process
from krasis.formats.process.worker_process import WorkerLost, WorkerProcess, WorkerRefusal

sys.path.append(str(Path(__file__).parents[1] / "support"))


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    process = WorkerProcess("odd_worker")
    yield process
    process.close()


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def ask(worker: WorkerProcess, operation: str, payload: bytes = b"", cpu_s: float = 5.0) -> bytes:
    return worker.call(operation, payload, cpu_s=cpu_s, memory_bytes=64 << 20, max_answer_bytes=32 << 20)


def test_what_is_said_comes_back(worker: WorkerProcess) -> None:
    for size in (0, 1, 100_000, 8 << 20):
        data = os.urandom(size)
        assert ask(worker, "say", data) == data


@pytest.mark.parametrize(
    ("operation", "payload", "reason"),
    [
        ("spin", b"", "more than 0.2 s"),
        ("grow", b"", "more than 64 MiB"),
        ("grow_in_c", b"", "more than 64 MiB"),
        ("leave", b"", "ends by itself"),
        ("die", b"11", "SIGSEGV"),
        ("die", b"6", "memory"),
        ("die", b"9", "SIGKILL"),
        ("gush", b"", "41943040 bytes"),
        ("babble", b"", "bytes"),
    ],
)
def test_a_worker_that_is_lost(worker: WorkerProcess, operation: str, payload: bytes, reason: str) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerLost, match=reason):
        ask(worker, operation, payload, cpu_s=0.2)
    assert time.monotonic() - begin < 9
    assert not worker.is_alive


@pytest.mark.parametrize(
    ("operation", "reason"),
    [("recurse", "recursion"), ("panic", "index out of bounds"), ("rude", "owned"), ("exit", "3")],
)
def test_a_worker_that_refuses_lives(worker: WorkerProcess, operation: str, reason: str) -> None:
    with pytest.raises(WorkerRefusal, match=reason) as caught:
        ask(worker, operation)
    assert len(str(caught.value)) < 3000
    assert ask(worker, "say", b"still here") == b"still here"


def test_a_worker_that_only_waits_meets_the_deadline(
    worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(worker, "say")
    monkeypatch.setattr(worker_process, "DEADLINE_S", 0.3)
    with pytest.raises(WorkerLost, match="no answer"):
        ask(worker, "sleep", b"20")
    assert not worker.is_alive


def test_more_than_it_can_hold_is_refused_while_it_is_sent(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerLost, match="memory"):
        ask(worker, "say", bytes(200 << 20))


def test_it_inherits_nothing(worker: WorkerProcess, tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        other = WorkerProcess("odd_worker")
        try:
            files, variables, folder, is_leader = ast.literal_eval(ask(other, "facts").decode())
        finally:
            other.close()
    assert files[:3] == [0, 1, 2]
    assert len(files) == 4  # the folder that is being listed
    assert "PATH" not in variables
    assert folder == "/"
    assert is_leader


def test_an_interrupt_at_the_terminal_is_not_for_it(worker: WorkerProcess) -> None:
    assert ask(worker, "interrupt") == b"alive"


def test_an_interrupt_of_the_owner_ends_it(worker: WorkerProcess) -> None:
    ask(worker, "say")
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ask(worker, "sleep", b"20")
    assert not worker.is_alive


def test_it_ends_with_its_owner() -> None:
    code = (
        "import sys, os, signal; sys.path.append(sys.argv[1])\n"
        "from krasis.formats.process.worker_process import WorkerProcess\n"
        "w = WorkerProcess('odd_worker')\n"
        "w.call('say', b'', cpu_s=5, memory_bytes=1 << 26, max_answer_bytes=9)\n"
        "print(w.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run([sys.executable, "-c", code, support], stdout=subprocess.PIPE, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":  # ended; nobody in this container collects it
            return
        time.sleep(0.05)
    pytest.fail("the worker outlives its owner")


@pytest.mark.parametrize("closed", [[0], [1], [0, 1, 2]])
def test_closed_standard_streams_are_not_mistaken_for_pipes(closed: list[int]) -> None:
    code = (
        "import sys, os; sys.path.append(sys.argv[1])\n"
        "from krasis.formats.process.worker_process import WorkerProcess\n"
        f"for fd in {closed}: os.close(fd)\n"
        "w = WorkerProcess('odd_worker')\n"
        "said = w.call('say', b'x' * 99, cpu_s=5, memory_bytes=1 << 26, max_answer_bytes=99)\n"
        "os._exit(17 if said == b'x' * 99 and min(w._requests, w._answers) > 2 else 1)\n"
    )
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run([sys.executable, "-c", code, support], check=False)
    assert done.returncode == 17


def test_a_system_that_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(worker_process.subprocess, "Popen", refuse)
    before = num_files()
    with pytest.raises(ResourceError, match=r"no worker process can be started.*temporarily unavailable"):
        WorkerProcess("odd_worker")
    assert num_files() == before
