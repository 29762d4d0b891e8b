"""krasis-run's chat on a plain pseudo-terminal: streaming, commands, several lines, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal_session import CTRL_C, CTRL_D, PROMPT, Session


@pytest.fixture
def session(chat_bundle: Path) -> Iterator[Session]:
    session = Session(
        chat_bundle, "--threads", "2", "--ctx", "32768", "--max-tokens", "10", "--seed", "3", term="dumb"
    )
    session.until(re.escape(PROMPT))
    yield session
    session.close()


def test_commands(session: Session, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    session.command("/help", "/regen")
    session.command("/nothing", "unknown command")
    session.command("/undo", "nothing to undo")
    session.command("/set temperature 0", r"temperature 0\.0")
    session.command("/set temperature warm", "must be a number")
    session.command("/set colour red", "unknown setting")
    session.command("/set top-k -3", "out of range")
    session.command("/system Speak in riddles.", "system message set")
    session.command("hello", "hello\n")
    session.command(f"/save {saved}", "saved")
    messages = json.loads(saved.read_text())["messages"]
    assert [one["role"] for one in messages] == ["system", "user", "assistant"]
    assert messages[:2] == [
        {"role": "system", "content": "Speak in riddles."},
        {"role": "user", "content": "hello"},
    ]
    session.command(f"/save {saved}", "cannot be saved")
    session.command("/stats", "answer 10 tokens")
    session.command("/regen", "regen\n")
    again = tmp_path / "again.json"
    session.command(f"/save {again}", "saved")
    # At temperature 0 the same question has the same answer.
    assert json.loads(again.read_text()) == json.loads(saved.read_text())
    session.command("/undo", "forgot")
    session.command("/undo", "nothing to undo")
    session.command(f"/load {saved}", "loaded 2 messages")
    session.command("/load /nowhere", "cannot be read")
    session.command("/reset", "forgot the conversation")
    session.command("/regen", "nothing to answer")
    session.type("/quit\n")
    assert session.ended() == 0


def test_an_edited_question(session: Session, tmp_path: Path) -> None:
    session.command("/edit", "no question to edit")
    session.command("/set temperature 0", "temperature")
    session.command("be so kind and count to three", "three\\n")
    session.command("/edit be so kind and count to four", "four\\n")
    session.command("/stats", r"prompt \d+ tokens \(\d+ cached\)")
    # Alone it brings the question back to the line; what is typed comes after it.
    session.type("/edit\n")
    session.until(r">>> be so kind and count to four")
    session.type("teen\n")
    session.until(re.escape(PROMPT))
    session.command(f"/save {tmp_path / 'talk.json'}", "saved")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "be so kind and count to fourteen"


def test_a_chat_is_saved_with_its_cache(session: Session, chat_bundle: Path, tmp_path: Path) -> None:
    session.command("/set temperature 0", "temperature")
    session.command("hello, said the fox", "fox\n")
    session.command(f"/save {tmp_path / 'talk.kv'}", r"with \d+ computed tokens")
    session.command(f"/save {tmp_path / 'talk.kv'}", r"with \d+ computed tokens")  # an older one is replaced
    flags = ["--threads", "2", "--ctx", "32768", "--max-tokens", "5", "--load-kv", str(tmp_path / "talk.kv")]
    again = Session(chat_bundle, *flags, "--save-kv", str(tmp_path / "later.kv"), term="dumb")
    again.until(r"\d+ tokens and 2 messages restored")
    again.until(re.escape(PROMPT))
    again.command("and then?", r"then\?\n")
    stats = again.command("/stats", r"prompt \d+ tokens \(\d+ cached\)")
    assert int(re.findall(r"\((\d+) cached\)", stats)[0]) > 10
    again.type("/quit\n")
    assert again.ended() == 0
    assert (tmp_path / "later.kv").stat().st_size > 4096
    again.close()


def test_several_lines(session: Session, tmp_path: Path) -> None:
    session.type("one \\\ntwo\n")
    session.until(r"\.\.\. ")
    session.until(re.escape(PROMPT))
    session.type('"""three\n\nfour\n"""\n')
    session.until(r"\.\.\. ")
    session.until(re.escape(PROMPT))
    session.command(f"/save {tmp_path / 'talk'}", "saved")
    contents = [one["content"] for one in json.loads((tmp_path / "talk").read_text())["messages"]]
    assert contents[0] == "one \ntwo"
    assert contents[2] == "three\n\nfour"


def test_an_unfinished_text_is_forgotten(session: Session, tmp_path: Path) -> None:
    for key in (CTRL_D, CTRL_C):
        session.type('"""three\n')
        session.until(r"\.\.\. ")
        session.wait_until_idle()
        session.type(key)
        session.until("forgotten")
        session.until(re.escape(PROMPT))
    session.command('"""four""" five', r"five\n")
    session.type(b"caf\xff e\n")
    session.until("not text in the terminal's encoding")
    session.until(re.escape(PROMPT))
    session.command(f"/save {tmp_path / 'talk'}", "saved")
    messages = json.loads((tmp_path / "talk").read_text())["messages"]
    assert [one["content"] for one in messages][::2] == ["four five"]


def test_ctrl_c_stops_the_answer_and_not_the_program(session: Session, tmp_path: Path) -> None:
    session.command("/set max_tokens none", "max_tokens none")
    session.type("hello\n")
    session.until("hello\n")
    session.until(r"[^\n]{20}")  # the answer has begun
    time.sleep(0.3)
    session.type(CTRL_C)
    session.until(re.escape(PROMPT))
    session.command(f"/save {tmp_path / 'talk'}", "saved")
    answer = json.loads((tmp_path / "talk").read_text())["messages"][1]
    assert answer["role"] == "assistant"
    assert answer["content"]
    # What was said stays in the cache: the next question does not compute it again.
    session.command("/set max_tokens 5", "max_tokens 5")
    session.command("and now?", r"now\?\n")
    stats = session.command("/stats", r"prompt \d+ tokens \(\d+ cached\)")
    prompt, cached = map(int, re.findall(r"prompt (\d+) tokens \((\d+) cached\)", stats)[0])
    assert cached > 10
    assert prompt - cached < prompt
    session.interrupt_prompt()
    session.until("Ctrl-C again")
    session.until(re.escape(PROMPT))
    session.command("/stats", "context")  # anything else in between, and it takes two again
    session.interrupt_prompt()
    session.until("Ctrl-C again")
    session.interrupt_prompt()
    assert session.ended() == 0


def test_ctrl_d_leaves(session: Session) -> None:
    session.type(CTRL_D)
    assert session.ended() == 0


def test_a_question_beyond_the_context_is_refused_and_forgotten(chat_bundle: Path) -> None:
    session = Session(chat_bundle, "--ctx", "48", "--threads", "2", term="dumb")
    session.until(re.escape(PROMPT))
    session.command("word " * 60, "context is full")
    session.command("/undo", "nothing to undo")
    session.command("hello", "the context is full: /reset")
    session.type("/quit\n")
    assert session.ended() == 0
    session.close()
