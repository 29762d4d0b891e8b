"""Files and pipes that a user names: no FIFO, device or folder is waited for, nothing endless is read."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from krasis.convert.importance import load_calibration
from krasis.convert.text_assets import assets_from_folder
from krasis.formats.errors import KrasisError, UsageError
from krasis.runtime import Engine
from krasis.runtime.cli.conversation import Conversation
from krasis.runtime.cli.run import main
from krasis.runtime.settings import EngineSettings, SamplingSettings
from krasis.runtime.state.kv_file import check_target
from krasis.runtime.user_files import MAX_PROMPT_BYTES

RUN = [sys.executable, "-c", "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')"]
KINDS = ["fifo", "folder", "socket", "zero", "link to zero", "dangling", "missing", "loop"]


@pytest.fixture
def strange(tmp_path: Path) -> Callable[[str], Path]:
    """A path at which something is that is no file."""

    def make(kind: str) -> Path:
        path = tmp_path / "strange"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "socket":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.close()
        elif kind == "zero":
            return Path("/dev/zero")
        elif kind == "link to zero":
            path.symlink_to("/dev/zero")
        elif kind == "dangling":
            path.symlink_to("/nowhere")
        elif kind == "loop":
            path.symlink_to(path)
        return path

    return make


def run(*arguments: object, seconds: float = 20, **options: object) -> subprocess.CompletedProcess[str]:
    options.setdefault("stdin", subprocess.DEVNULL)
    line = [*RUN, *map(str, arguments)]
    return subprocess.run(
        line,
        text=True,
        check=False,
        timeout=seconds,
        capture_output=True,
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_file(chat_bundle: Path, strange: Callable[[str], Path], kind: str) -> None:
    done = CliRunner().invoke(main, [str(chat_bundle), "--file", str(strange(kind))])
    assert done.exit_code == 2, done
    assert done.stderr.startswith("krasis-run: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_conversation(chat_bundle: Path, strange: Callable[[str], Path], kind: str) -> None:
    path = strange(kind)
    with Engine.open(chat_bundle, EngineSettings(context=64)) as engine:
        conversation = Conversation(engine, SamplingSettings(), None, None)
        begin = time.monotonic()
        with pytest.raises(UsageError):
            conversation.load(path)
        with pytest.raises(KrasisError):
            engine.load_prefix(path)
        assert time.monotonic() - begin < 1


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_a_saved_prefix(chat_bundle: Path, strange: Callable[[str], Path], kind: str) -> None:
    path = strange(kind)
    for option, code in (("--load-kv", 3), ("--save-kv", 2)):
        done = CliRunner().invoke(main, [str(chat_bundle), "--prompt", "x", option, str(path)])
        assert done.exit_code == code, done.output


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibration(strange: Callable[[str], Path], kind: str) -> None:
    with pytest.raises(KrasisError):
        load_calibration(strange(kind), None)  # type: ignore[arg-type]  # refused before it matters


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling", "link to zero"])
def test_a_text_file_of_a_checkpoint(tmp_path: Path, strange: Callable[[str], Path], kind: str) -> None:
    """Not skipped: a bundle would lack its tokenizer without a word."""
    path = strange(kind)
    path.rename(path.with_name("tokenizer.json"))
    found, unreadable = assets_from_folder(tmp_path)
    assert not found
    assert "tokenizer.json" in str(unreadable["tokenizer.json"])


def test_endless_input_is_refused_at_once(chat_bundle: Path) -> None:
    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        done = run(chat_bundle, stdin=endless.stdout, preexec_fn=limits)
        endless.kill()
    assert done.returncode == 2, done
    assert "longer than any prompt" in done.stderr


def test_a_huge_file_is_not_read(chat_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 1 << 40)
    done = run(chat_bundle, "--file", path)
    assert done.returncode == 2, done
    assert "file is too large" in done.stderr


@pytest.mark.parametrize("raw", [True, False])
def test_too_long_for_the_context_is_known_before_it_is_tokenised(
    chat_bundle: Path, raw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "y\n" * (MAX_PROMPT_BYTES // 2)
    with Engine.open(chat_bundle, EngineSettings(context=512)) as engine:
        monkeypatch.setattr(type(engine.text.tokenizer), "encode", lambda *_, **__: pytest.fail("tokenised"))
        with pytest.raises(UsageError, match="the context is full") as caught:
            engine.generate(text if raw else [{"role": "user", "content": text}])
    assert len(str(caught.value)) < 400


def test_a_text_that_fits_is_never_refused(chat_bundle: Path) -> None:
    """The densest text there is: the longest token, over and over."""
    with Engine.open(chat_bundle, EngineSettings(context=32768)) as engine:
        assert len(engine.encode("<|im_start|>" * 32767)) == 32767


def test_no_half_conversation_is_left_on_a_full_disk(
    chat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.open(chat_bundle, EngineSettings(context=64)) as engine:
        conversation = Conversation(engine, SamplingSettings(), None, None)

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwritev", full)
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(UsageError, match="No space left"):
            conversation.save(tmp_path / "talk.json")
        assert not list(tmp_path.iterdir())
        (tmp_path / "talk.json").write_text("mine")
        with pytest.raises(UsageError, match="File exists"):
            conversation.save(tmp_path / "talk.json")
        assert (tmp_path / "talk.json").read_text() == "mine"


def test_where_a_prefix_must_not_be_saved(
    chat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before the first token, and not after hours of chat."""
    done = run(chat_bundle, "--prompt", "x", "--max-tokens", 1, "--save-kv", tmp_path / "talk.kv.partial")
    assert done.returncode == 2, done
    assert not done.stdout
    assert "choose another name" in done.stderr
    with pytest.raises(UsageError, match="too long"):
        check_target(tmp_path / ("x" * 250), chat_bundle)
    with pytest.raises(UsageError, match="inside the bundle"):
        check_target(chat_bundle / "talk.kv", chat_bundle)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match="cannot be written to"):
        check_target(tmp_path / "talk.kv", chat_bundle)
