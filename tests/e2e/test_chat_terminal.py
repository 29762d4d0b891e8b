"""A chat on a terminal that can edit: pastes, several lines, history, Tab, keys during an answer, job
control, and nothing that drives the terminal.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal_session import ALT_ENTER, CTRL_C, CTRL_D, CTRL_Z, PROMPT, TAB, UP, Session

from tests.support.patience import PATIENCE_S

FLAGS = ["--threads", "2", "--ctx", "32768", "--max-tokens", "6", "--temperature", "0"]
NEXT = re.escape(PROMPT)
ASKED = rf"\n(?s:.*?){NEXT}"  # an answer has come, and the next prompt
Start = Callable[..., Session]


@pytest.fixture
def start(chat_bundle: Path) -> Iterator[Start]:
    """(*flags, **of Session) -> a chat at its first prompt."""
    sessions = []

    def begin(*flags: str, **options: object) -> Session:
        session = Session(chat_bundle, *FLAGS, *flags, **options)  # type: ignore[arg-type]
        sessions.append(session)
        session.until(NEXT)
        return session

    yield begin
    for session in sessions:
        session.close()


def questions(session: Session, path: Path) -> list[str]:
    """What the user of a session has asked so far, by /save."""
    path.unlink(missing_ok=True)
    session.command(f"/save {path}", "saved")
    rows = json.loads(path.read_text())["messages"]
    assert [row["role"] for row in rows] == ["user", "assistant"] * (len(rows) // 2)
    return [row["content"] for row in rows if row["role"] == "user"]


def test_pasted_lines_are_one_question(start: Start, tmp_path: Path) -> None:
    session = start()
    code = '/quit\ndef f():\n\treturn "a\\\\" \\\n    + 1  # 🙂 é\n"""\n'
    session.paste(code)
    session.type("\r")
    session.until(ASKED)
    session.type("what is this: ")
    session.paste("one\ntwo\n")
    session.type("\r")
    session.until(ASKED)
    session.paste('"""Doc."""\nimport os')
    session.type("\r")
    session.until(ASKED)
    session.paste("/undo\n")  # one line is what a keyboard could have typed: a command, but after Enter only
    session.wait_until_idle()
    assert "forgot" not in session.unread
    session.command("", "forgot the last question")
    assert questions(session, tmp_path / "talk") == [code.strip("\n"), "what is this: one\ntwo"]


def test_several_lines_are_typed(start: Start, tmp_path: Path) -> None:
    session = start()
    for keys in (
        "one \\\ntwo\n",
        '"""three\n\nfour\n"""\n',
        f"five{ALT_ENTER}six\n",
        '"""seven""" and eight\n',
    ):
        session.type(keys)
        session.until(rf"(six|two|\"\"\"|eight)\n(?s:.*?){NEXT}")
    # Ctrl-C gives up a text that is not finished, and a new one begins; it does not count as leaving.
    session.type('"""nine\nten')
    session.until(r"\.\.\. ten")
    session.type(CTRL_C)
    session.until(NEXT)
    found = questions(session, tmp_path / "talk")
    assert found == ["one \ntwo", "three\n\nfour", "five\nsix", "seven and eight"]


def test_no_command_ends_the_chat(start: Start, tmp_path: Path) -> None:
    session = start()
    session.command("/save ~nosuchuser/x", "no such user")
    session.command("/load ~nosuchuser/x", "no such user")
    session.command(f"/save {tmp_path}", "cannot be saved")
    session.command(f"/load {tmp_path}", "cannot be read")
    session.command(f"/save {tmp_path / ('n' * 300)}", "too long")
    session.command("/save", "wrong use")
    session.command("/set stats maybe", "on or off")
    session.command("/set seed 99999999999999999999999", "out of range")
    session.command("/set top_k " + "9" * 5000, "must be a number")
    session.command("/edit", "no question to edit")
    session.command("hello", r"hello\n")
    session.type("/edit\n")
    session.until(rf"{NEXT}hello")
    session.type("\x01\x0b" + CTRL_D)  # all of it deleted, and Ctrl-D: no edit
    session.until(NEXT)
    session.type("/edit\n")
    session.until(rf"{NEXT}hello")
    session.type(CTRL_C)
    session.until(NEXT)
    assert questions(session, tmp_path / "talk") == ["hello"]
    session.paste('"""\n\\')
    session.type("\n")
    session.until(ASKED)
    session.type("/edit\n")
    session.until(r'>>> """\n\.\.\. \\')
    session.type("!\n")  # an edit is sent, whatever it begins or ends with
    session.until(ASKED)
    assert questions(session, tmp_path / "talk") == ["hello", '"""\n\\!']
    session.type("/exit\n")
    assert session.ended() == 0


def test_questions_that_begin_with_a_slash(start: Start, tmp_path: Path) -> None:
    session = start()
    asked = ["/etc/hosts is what?", "/usr/bin", "/usr", "// a comment", " /help", "//help", '"""/quit"""']
    for text in asked:
        session.type(text + "\n")
        session.until(re.escape(text) + ASKED)
    session.command("/hepl", "did you mean /help")
    session.command("/svae talk", "did you mean /save")
    session.command("/nothing", "unknown command")
    found = questions(session, tmp_path / "talk")
    assert found == [*asked[:4], "/help", "/help", "/quit"]


def test_bytes_that_are_no_text_are_refused(start: Start, tmp_path: Path) -> None:
    session = start()
    session.paste(b"caf\xe9?")
    session.type("\n")
    session.until("not text in the terminal's encoding")
    session.until(NEXT)
    session.paste(b"a\xff\xfeb\nc")
    session.type("\n")
    session.until("not text in the terminal's encoding")
    session.until(NEXT)
    session.command("café?", r"café\?\n")
    assert questions(session, tmp_path / "talk") == ["café?"]


def test_keys_pressed_during_an_answer_wait_for_the_next_prompt(start: Start, tmp_path: Path) -> None:
    session = start("--stats")
    session.command("/set max_tokens 400", "max_tokens 400")
    session.type("hello\n")
    session.until(r"hello\n[^\n]{20}")
    assert not session.echoes()
    long = "x" * 4500  # the kernel's own line editor would cut it at 4,095 bytes
    session.type("/set max_tokens 5\n")
    session.paste("and then?\n/quit\n")  # a paste is one also now
    session.type(f"\n/set stats off\n/system {long}")
    session.until(r"\[400 tokens, [\d.]+ tok/s on CPU; prompt \d+ tokens")
    session.until(r"max_tokens 5, stats on")
    session.until(r"\[5 tokens, [\d.]+ tok/s on CPU; prompt \d+ tokens \(\d+ cached\)")
    session.until("stats off")
    session.command("", "system message set")
    session.command(f"/save {tmp_path / 'talk'}", "saved")
    rows = json.loads((tmp_path / "talk").read_text())["messages"]
    assert [rows[index]["content"] for index in (0, 1, 3)] == [long, "hello", "and then?\n/quit"]
    session.type(CTRL_D)
    assert session.ended() == 0
    assert session.echoes()
    assert session.raw.rfind(b"\x1b[?2004l") > session.raw.rfind(b"\x1b[?2004h")


def test_history_is_kept_for_the_owner_only(start: Start, tmp_path: Path) -> None:
    home = tmp_path / "state"
    first = start(home=home)
    first.paste("a\nb")
    first.type("\n")
    first.until(ASKED)
    first.command("secret 🙂", "secret 🙂\n")
    first.type("/quit\n")
    assert first.ended() == 0
    file = home / "krasis" / "history"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [json.loads(line) for line in file.read_text().splitlines()] == ["a\nb", "secret 🙂", "/quit"]
    second = start(home=home)
    second.type(UP + UP)
    second.until("secret 🙂")
    second.type("!\n")
    second.until(r"secret 🙂!\n")
    second.until(NEXT)
    held = file.read_bytes()
    third = start("--no-history", home=home)
    third.type(UP)
    third.command("third", r">>> third\n")
    assert file.read_bytes() == held


def test_tab_completes_commands_files_and_settings(start: Start, tmp_path: Path) -> None:
    (tmp_path / "a talk.json").write_text('{"messages": [{"role": "user", "content": "hm"}]}')
    session = start()
    session.type("/lo" + TAB)
    session.until("/load")
    session.type(f" {tmp_path}/a" + TAB + "\n")
    session.until("loaded 1 messages")
    session.until(NEXT)
    session.type("/set temp" + TAB + " 0.5\n")
    session.until(r"temperature 0\.5")
    session.until(NEXT)
    session.type("/re" + TAB + TAB)
    session.until("regen")


_PATCHED = """
import sys, time
from krasis.runtime.engine import Engine
from krasis.runtime.held_tokens import HeldTokens
{patch}
from krasis.runtime.cli.run import main
main(prog_name="krasis-run")
"""
_SLOW_PREFILL = """
prefill = HeldTokens.prefill
def slow(self, *args, **options):
    print("computing", flush=True)
    time.sleep(60)
    return prefill(self, *args, **options)
HeldTokens.prefill = slow
"""
_SLOW_SAVE = """
from krasis.runtime.cli.conversation import Conversation
def slow(self, path):
    print("saving", flush=True)
    for _ in range(600):  # a signal that another thread takes does not wake this one from a sleep
        time.sleep(0.1)
Conversation.save = slow
"""
_FAULTY_SAVE = """
from krasis.runtime.cli.conversation import Conversation
def fault(self, path):
    raise MemoryError("as if")
Conversation.save = fault
"""
_HOSTILE = """
from krasis.runtime.text.tokenizer import TokenStream
TokenStream.push = lambda self, token: "\\x1b]52;c;RVZJTA==\\x07\\x9b31m\\u202eEVIL\\x1b[2J\\r"
"""


def patched(patch: str) -> list[str]:
    return [sys.executable, "-c", _PATCHED.format(patch=patch)]


def test_ctrl_c_while_a_prompt_is_computed_leaves_nothing(start: Start, tmp_path: Path) -> None:
    session = start("--no-history", command=patched(_SLOW_PREFILL))
    for line in ("hello", "again"):
        session.type(line + "\n")
        session.until("computing")
        session.type(CTRL_C)
        session.until("as it was before")
        session.until(NEXT)
    session.command("/undo", "nothing to undo")
    session.command("/regen", "nothing to answer again")
    (tmp_path / "talk").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    session.command(f"/load {tmp_path / 'talk'}", "loaded 2")
    for line in ("/regen", "/edit c"):  # the old answer stays
        session.type(line + "\n")
        session.until("computing")
        session.type(CTRL_C)
        session.until("as it was before")
        session.until(NEXT)
    session.command(f"/save {tmp_path / 'again'}", "saved")
    assert json.loads((tmp_path / "again").read_text()) == json.loads((tmp_path / "talk").read_text())


def test_ctrl_c_and_faults_in_a_command(start: Start) -> None:
    session = start("--no-history", command=patched(_SLOW_SAVE))
    session.type("/save x\n")
    session.until("saving")
    session.type(CTRL_C)
    session.until(r"\(stopped\)")
    session.until(NEXT)
    session.command("/stats", "context 0 of")
    session = start("--no-history", command=patched(_FAULTY_SAVE))
    session.command("/save x", "MemoryError: as if.*the chat goes on")
    session.command("/stats", "context 0 of")


def test_nothing_of_a_model_or_a_file_drives_the_terminal(start: Start, tmp_path: Path) -> None:
    session = start("--no-history", command=patched(_HOSTILE))
    session.command("hello", r"EVIL\\x1b\[2J")
    evil = "\x1b]0;owned\x07\x1b[31mEVIL\u202e"
    for number, record in enumerate(
        ({evil: 1}, {"messages": [{"role": evil, "content": "x"}]}, {"messages": [{evil: 1}]})
    ):
        (tmp_path / f"{number}{evil}.json").write_text(json.dumps(record))
        session.type(f"/load {tmp_path}/{number}" + TAB)
        session.wait_until_idle()
        session.type("\n")
        session.until(rf"\n(?s:.*)EVIL(?s:.*){NEXT}")
    (tmp_path / "talk.json").write_text(json.dumps({"messages": [{"role": "user", "content": evil}]}))
    session.command(f"/load {tmp_path / 'talk.json'}", "loaded 1")
    session.type("/edit\n")
    session.until("EVIL")
    session.wait_until_idle()
    assert b"\x1b]" not in session.raw
    assert b"\x07" not in session.raw
    assert "\u202e" not in session.raw.decode()
    assert "\x9b" not in session.raw.decode()


_SHELL = """
import os, signal, sys, termios
child = os.fork()
if not child:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    from krasis.runtime.cli.run import main
    main(prog_name="krasis-run")
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
while True:
    _, status = os.waitpid(child, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    os.tcsetpgrp(0, os.getpgrp())
    sane = termios.tcgetattr(0)[3] & (termios.ECHO | termios.ICANON) == termios.ECHO | termios.ICANON
    print("SUSPENDED", "sane" if sane else "broken", flush=True)
    sys.stdin.readline()
    os.tcsetpgrp(0, child)
    os.killpg(child, signal.SIGCONT)
"""


def test_suspended_and_resumed(start: Start, tmp_path: Path) -> None:
    session = start("--no-history", command=[sys.executable, "-c", _SHELL])
    session.type("half a ques")
    session.until("ques")
    session.type(CTRL_Z)
    session.until("SUSPENDED sane")
    session.type("\n")
    session.until("half a ques")
    session.type("tion\n")
    session.until(r"half a question\n")
    session.until(NEXT)
    session.command("/set max_tokens none", "max_tokens none")
    session.type("hello\n")
    session.until(r"hello\n[^\n]{20}")
    session.type(CTRL_Z)
    session.until("SUSPENDED sane")
    session.type("\n")
    time.sleep(0.3)
    assert not session.echoes()
    session.type(CTRL_C)
    session.until(NEXT)
    session.resize(10, 20)
    assert questions(session, tmp_path / "t") == ["half a question", "hello"]
    session.type("/quit\n")
    assert session.ended() == 0


def test_signals_and_a_terminal_that_is_gone(start: Start) -> None:
    session = start()
    session.type("half a ques")
    session.until("ques")
    session.process.send_signal(signal.SIGINT)  # from outside: as Ctrl-C does
    session.until("Ctrl-C again")
    session.until(NEXT)
    session.type(f'"""a{CTRL_D}{ALT_ENTER}b')  # Ctrl-D in the middle of a text deletes, and does not end
    session.until(r"\.\.\. b")
    session.type(CTRL_C)
    session.until(NEXT)
    session.wait_until_idle()
    assert session.process.poll() is None
    gone = start(
        "--no-history", command=patched("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    )
    os.close(gone.master)
    gone.master = os.open(os.devnull, os.O_RDWR)
    assert gone.process.wait(PATIENCE_S) in (0, 6)  # 6: its last words could not be written


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"PYTHONIOENCODING": "latin-1", "term": "dumb"}, "EVIL [?]{2}"),
        ({"PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}, "EVIL [?]{2}"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "EVIL [?]{2}"),
    ],
)
def test_other_encodings_replace_what_they_lack(start: Start, options: dict[str, str], shown: str) -> None:
    command = patched(_HOSTILE.replace("EVIL", r"EVIL \u20ac\U0001f642"))
    session = start("--no-history", command=command, **options)
    session.command("hello", shown)
    session.command("/system Grüße", "system message set|not text in the terminal's encoding")
    session.type("/quit\n")
    assert session.ended() == 0
    assert not re.search(rb"\x1b\[[0-9;]*[34][0-9][0-9;]*m", session.raw)  # no colours, asked for or not
