"""SIGTERM, SIGHUP and a closed terminal end the commands as Ctrl-C does: in order, and saved as asked."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal_session import readable

from krasis.runtime import Engine

RUN = [sys.executable, "-c", "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')"]
SIGNALS = [signal.SIGTERM, signal.SIGHUP]
# A command that gets a signal at a given call: what is patched, the signal, then the command's arguments.
SELF = """
import os, signal, sys
from importlib import import_module
module, path, at, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
owner = import_module(sys.argv[5])
*names, last = path.split(".")
for name in names:
    owner = getattr(owner, name)
real, calls = getattr(owner, last), []
def call(*arguments, **options):
    calls.append(1)
    if len(calls) == at:
        os.kill(os.getpid(), number)
    return real(*arguments, **options)
setattr(owner, last, call)
main = import_module(module).main
sys.argv = ["krasis", *sys.argv[6:]]
main()
"""
# The same in a finalizer: Python drops what is raised there.
LOST = SELF.replace("        os.kill(os.getpid(), number)", "        Lost()").replace(
    "def call(",
    """
class Lost:
    def __del__(self):
        os.kill(os.getpid(), number)
        for _ in range(100):
            pass
def call(""",
)


def signalled(
    command: str, owner: str, call: str, at: int, number: int, *arguments: object, code: str = SELF
):
    line = [sys.executable, "-c", code, command, call, str(at), str(int(number)), owner, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def tokens_of(bundle: Path, saved: Path) -> int:
    with Engine.open(bundle) as engine:
        engine.load_prefix(saved)
        engine.prefill([1])
        return len(engine.tokens) - 1


def test_a_one_shot_answer_is_saved(chat_bundle: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.kv"
    command = [*RUN, str(chat_bundle), "--prompt", "hello", "--ctx", "32768", "--save-kv", str(saved)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGTERM)  # as whoever closes a session does: one after the other
        process.send_signal(signal.SIGHUP)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGHUP), stderr
    assert b"Traceback" not in stderr
    assert b"stopped by SIG" in stderr.splitlines()[-1]
    assert tokens_of(chat_bundle, saved) > 1


@pytest.mark.parametrize("number", SIGNALS)
def test_the_code_names_the_signal(chat_bundle: Path, tmp_path: Path, number: int) -> None:
    saved = tmp_path / "talk.kv"
    arguments = (chat_bundle, "--prompt", "hello", "--save-kv", saved, "--ctx", 512)
    done = signalled(
        "krasis.runtime.cli.run", "krasis.runtime.held_tokens", "HeldTokens.decode", 5, number, *arguments
    )
    assert done.returncode == 128 + number, done
    assert done.stderr.splitlines()[-1] == f"krasis-run: stopped by {signal.Signals(number).name}"
    assert saved.exists()
    assert done.stdout  # what was said stays said


def test_a_lost_interrupt_is_asked_for(chat_bundle: Path, checkpoint_copy: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.kv"
    arguments = (chat_bundle, "--prompt", "hello", "--save-kv", saved, "--ctx", 2048)
    where = ("krasis.runtime.cli.run", "krasis.runtime.held_tokens", "HeldTokens.decode", 5)
    done = signalled(*where, signal.SIGTERM, *arguments, code=LOST)
    assert "KeyboardInterrupt" in done.stderr  # Python told that it dropped one
    assert done.returncode == 143, done
    assert 1 < tokens_of(chat_bundle, saved) < 100
    where = ("krasis.convert.cli", "krasis.convert.journal", "Journal.append", 3)
    done = signalled(*where, signal.SIGTERM, checkpoint_copy, "-o", tmp_path / "out.krasis", code=LOST)
    assert "KeyboardInterrupt" in done.stderr
    assert done.stderr.splitlines()[-1] == "krasis-convert: stopped; run the same command to continue"
    assert done.returncode == 143, done


def test_while_it_loads_and_while_it_saves(chat_bundle: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.kv"
    arguments = (chat_bundle, "--prompt", "hello", "--save-kv", saved, "--max-tokens", 4)
    done = signalled(
        "krasis.runtime.cli.run", "krasis.runtime.engine", "Engine.open", 1, signal.SIGTERM, *arguments
    )
    assert (done.returncode, saved.exists()) == (143, False), done
    assert done.stderr.splitlines() == ["krasis-run: stopped by SIGTERM"]
    for number in (signal.SIGTERM, signal.SIGINT):
        done = signalled(
            "krasis.runtime.cli.run", "krasis.runtime.held_tokens", "save_prefix", 1, number, *arguments
        )
        assert (done.returncode, saved.exists()) == (0, True), done  # it was the last thing to do
        saved.unlink()


def test_a_save_that_fails_is_told(chat_bundle: Path, tmp_path: Path) -> None:
    saved = tmp_path / "gone" / "talk.kv"
    saved.parent.mkdir()
    code = SELF.replace("real, calls =", f"import shutil; shutil.rmtree('{saved.parent}')\nreal, calls =")
    code = code.replace(
        "main = import",
        "from krasis.runtime.state import kv_file\nkv_file.check_target = print\nmain = import",
    )
    line = [
        "krasis.runtime.cli.run",
        "HeldTokens.decode",
        "3",
        "15",
        "krasis.runtime.held_tokens",
        chat_bundle,
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *line, "--prompt", "x", "--save-kv", saved, "--ctx", "512"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode in (2, 6), done
    assert "Traceback" not in done.stderr


def test_nohup_stays_nohup(chat_bundle: Path) -> None:
    where = "krasis.runtime.held_tokens"
    line = ["krasis.runtime.cli.run", "HeldTokens.decode", "3", str(int(signal.SIGHUP)), where]
    command = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", sys.executable, "-c", SELF, *line]
    done = subprocess.run(
        [*command, chat_bundle, "--prompt", "hello", "--max-tokens", "5"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done


class Chat:
    """krasis-run on a pseudo-terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [*RUN, *map(str, arguments)])  # noqa: S606 -- our own interpreter

    def until(self, text: bytes, seconds: float = 30, *, more: bool = False) -> None:
        """Reads until text has come; more: and something after it."""
        seen, deadline = b"", time.monotonic() + seconds
        while text not in seen or (more and seen.endswith(text)):
            assert readable(self.master, deadline - time.monotonic()), seen
            seen += os.read(self.master, 65536)

    def ended(self) -> int:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        pytest.fail("it did not end")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "closed"])
@pytest.mark.parametrize("when", ["answering", "waiting"])
def test_a_chat_is_saved(chat_bundle: Path, tmp_path: Path, how: str, when: str) -> None:
    saved = tmp_path / "talk.kv"
    arguments = [chat_bundle, "--save-kv", saved, "--ctx", "32768"]
    chat = Chat(*arguments, *(["--max-tokens", "5"] if when == "waiting" else []))
    chat.until(b">>> ")
    os.write(chat.master, b"hello\n")
    if when == "waiting":
        chat.until(b">>> ")
        time.sleep(0.5)  # until it waits for a key
    else:
        chat.until(b"hello\r\n", more=True)
    if how == "closed":
        os.close(chat.master)
    else:
        os.kill(chat.pid, signal.Signals[how])
    code = chat.ended()
    assert code == 128 + (signal.SIGTERM if how == "SIGTERM" else signal.SIGHUP)
    assert tokens_of(chat_bundle, saved) > 1
    with Engine.open(chat_bundle) as engine:
        conversation = engine.load_prefix(saved)
    assert b'"hello"' in conversation
    if how != "closed":  # what it wrote last may have met a terminal that was gone
        assert b'"assistant"' in conversation


@pytest.mark.parametrize("number", SIGNALS)
def test_a_conversion_can_be_continued(checkpoint_copy: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out.krasis"
    arguments = ("krasis.convert.cli", "krasis.convert.journal", "Journal.append", 3, number)
    done = signalled(*arguments, checkpoint_copy, "-o", out)
    assert done.returncode == 128 + number, done
    assert done.stderr.splitlines()[-1] == "krasis-convert: stopped; run the same command to continue"
    again = subprocess.run(
        [sys.executable, "-c", "from krasis.convert.cli import main; main()", checkpoint_copy, "-o", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again
    assert "continuing" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_the_very_end_of_a_conversion(checkpoint_copy: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out.krasis"
    arguments = ("krasis.convert.cli", "krasis.formats.bundle.writer", "publish", 1, number)
    done = signalled(*arguments, checkpoint_copy, "-o", out)
    assert done.returncode == 0, done
    assert [path.name for path in tmp_path.glob("out*")] == [out.name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_verification_stops_at_once(chat_bundle: Path, number: int) -> None:
    arguments = ("krasis.runtime.cli.info_command", "krasis.formats.bundle.verify", "as_completed", 1, number)
    done = signalled(*arguments, chat_bundle, "--verify")
    assert done.returncode == 128 + number, done
    assert done.stderr.splitlines() == ["krasis-info: stopped"]
    assert not done.stdout
