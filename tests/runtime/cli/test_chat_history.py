"""The history of chats: private, bounded, and never a reason for a chat to end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from krasis.runtime.cli import chat_history
from krasis.runtime.cli.chat_history import ChatHistory, history_path


def earlier(path: Path) -> list[str]:
    return list(ChatHistory(path).load_history_strings())


def test_texts_come_back_newest_first_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history"
    history = ChatHistory(path)
    texts = ["one", "two\nlines\r\x1b[31m", "🙂 caf\udce9", ""]
    for text in texts:
        history.store_string(text)
    history.store_string("x" * 20_000)  # too long to be kept
    assert earlier(path) == texts[::-1]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_an_older_file_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text('"one"\n')
    path.chmod(0o644)
    assert earlier(path) == ["one"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b'"one"\n{"a": 1}\n\xff\xfe\n"cut\n' + b"[" * 100_000 + b'\n\n17\n"two"')
    assert earlier(path) == ["two", "one"]


def test_a_long_file_loses_its_older_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_history, "MAX_FILE_BYTES", 1000)
    path = tmp_path / "history"
    path.write_text("".join(json.dumps(f"text {number:04}") + "\n" for number in range(200)))
    found = earlier(path)
    assert found[0] == "text 0199"
    assert 30 < len(found) < 80
    assert path.stat().st_size <= 500
    assert earlier(path) == found


@pytest.mark.parametrize("kind", ["folder", "fifo", "file as folder", "device"])
def test_what_is_no_file_is_told_once(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("")
        path = path / "history"
    history = ChatHistory(path)
    for text in ("one", "two"):
        history.store_string(text)
    assert list(history.load_history_strings()) == []
    assert capsys.readouterr().err.count("are not remembered") == 1


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    history = ChatHistory(None)
    monkeypatch.setattr(history, "_path", Path("history"))
    monkeypatch.setattr(history, "_open", lambda _: os.open("/dev/full", os.O_WRONLY))
    history.store_string("one")
    assert "No space left" in capsys.readouterr().err


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "krasis" / "history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "krasis" / "history"
