"""What a line of a chat is taken for."""

from __future__ import annotations

import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.cli.chat_commands import Call, Question, parse
from krasis.runtime.cli.prompt_input import Typed
from krasis.runtime.cli.terminal import COMMANDS, path_of


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("/help", Call("help", "")),
        ("/save  a b.json ", Call("save", "a b.json")),
        ("/system\tBe brief.", Call("system", "Be brief.")),
        ("/system one\ntwo", Call("system", "one\ntwo")),
        ('/system """one\ntwo"""', Call("system", "one\ntwo")),
        ("/exit", Call("quit", "")),
        ("/clear", Call("reset", "")),
        ("/?", Call("help", "")),
        ("hello /help", Question("hello /help")),
        ("/etc/hosts is what?", Question("/etc/hosts is what?")),
        ("/usr/bin", Question("/usr/bin")),
        ("/tmp", Question("/tmp")),  # noqa: S108
        ("/help/me", Question("/help/me")),
        ("/save.json is where?", Question("/save.json is where?")),
        ("/ is the root", Question("/ is the root")),
        ("/", Question("/")),
        ("/ help", Question("/ help")),
        ("/* a comment */", Question("/* a comment */")),
        ("// a comment", Question("// a comment")),
        ("//", Question("//")),
        ("//help", Question("/help")),
        (" /help", Question("/help")),
        ("/help\nmeans what?", Question("/help\nmeans what?")),
        ("/s/foo/bar/ does what?", Question("/s/foo/bar/ does what?")),
        ("/remind me of something", Question("/remind me of something")),
        ('"""/help"""', Question("/help")),
        ('"""a\nb""" and c', Question("a\nb and c")),
        ('  """a""" """b"""', Question('a """b"""')),
        ('say """a"""', Question('say """a"""')),
        ('"""', Question("")),
    ],
)
def test_questions_and_commands(text: str, meant: object) -> None:
    assert parse(Typed(text), COMMANDS) == meant


def test_pasted_lines_are_a_question_whatever_they_say() -> None:
    for text in ("/quit\nnow", '"""Doc."""\nimport os', "a\\\nb"):
        assert parse(Typed(text, literal=True), COMMANDS) == Question(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("/hlep", "did you mean /help"),
        ("/svae talk.json", "did you mean /save"),
        ("/loda", "did you mean /load"),
        ("/sest x 1", "did you mean /set"),
        ("/regenn", "did you mean /regen"),
        ("/models", "/help lists them"),
    ],
)
def test_misspelt_commands_are_not_sent(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match="unknown command") as caught:
        parse(Typed(text), COMMANDS)
    assert hint in caught.value.hint
    assert "a blank before the slash" in caught.value.hint
    assert parse(Typed(f" {text}"), COMMANDS) == Question(text)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("text", ["caf\udce9", "/save caf\udce9", "a\n\ud800b"])
def test_what_is_no_text_is_refused(text: str, literal: bool) -> None:
    with pytest.raises(UsageError, match="not text in the terminal's encoding"):
        parse(Typed(text, literal), COMMANDS)


def test_names_of_files() -> None:
    assert str(path_of("a b")) == "a b"
    for name in ("~nosuchuser/x", "~nosuchuser", "a\0b"):
        with pytest.raises(UsageError):
            path_of(name)
