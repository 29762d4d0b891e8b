"""Text on its way in, by the command and the library: bytes, stops, templates of the user, saved talks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from krasis.formats.errors import FormatError, UsageError
from krasis.runtime import Engine, EngineSettings, Message, SamplingSettings
from krasis.runtime.cli import conversation as talks
from krasis.runtime.cli.conversation import Conversation
from krasis.runtime.cli.run import main

RUN = [sys.executable, "-c", "from krasis.runtime.cli.run import main; main(prog_name='krasis-run')"]
GREEDY = ["--temperature", "0", "--max-tokens", "3", "--ctx", "256", "--threads", "1"]
EMOJI = "\U0001f642"


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], input=stdin, prog_name="krasis-run")


@pytest.fixture(scope="module")
def engine(chat_bundle: Path) -> Any:
    with Engine.open(chat_bundle, EngineSettings(context=256, threads=1)) as opened:
        yield opened


def as_bytes(bundle: Path, *arguments: str | bytes, **environment: str) -> tuple[int, str]:
    """The exit code and stderr of the command with arguments that no str can hold."""
    done = subprocess.run(
        [*RUN, os.fsencode(bundle), *GREEDY, *arguments],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        timeout=60,
    )
    return done.returncode, done.stderr.decode("utf-8", "replace")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--raw", "--prompt", b"caf\xe9?"],
        ["--prompt", b"\xff"],
        ["--system", b"caf\xe9", "--prompt", "hi"],
        ["--stop", b"\xe9", "--prompt", "hi"],
    ],
)
def test_bytes_that_are_no_text_are_refused_in_a_sentence(
    chat_bundle: Path, arguments: list[str | bytes]
) -> None:
    code, told = as_bytes(chat_bundle, *arguments)
    assert code == 2
    assert told.count("\n") == 1
    assert "is not UTF-8 text (got bad byte at character" in told


def test_utf8_is_text_whatever_the_locale(chat_bundle: Path) -> None:
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, told = as_bytes(chat_bundle, "--json", "--raw", "--prompt", "café".encode(), **plain)
    assert code == 0, told
    assert "prompt 5 tokens" in told


def test_a_byte_order_mark_of_a_file_is_no_part_of_the_prompt(chat_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfhi")
    for arguments, stdin in ((["--file", tmp_path / "q.txt"], None), ([], b"\xef\xbb\xbfhi")):
        result = run(chat_bundle, *arguments, "--raw", "--json", *GREEDY, stdin=stdin)
        assert json.loads(result.stdout)["num_prompt_tokens"] == 2
    # In a text it is a character like others, as in transformers.
    result = run(chat_bundle, "--prompt", "\ufeffhi", "--raw", "--json", *GREEDY)
    assert json.loads(result.stdout)["num_prompt_tokens"] == 5


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.generate("a\udcff"),
        lambda engine: engine.generate([{"role": "user", "content": "a\udcff"}]),
        lambda engine: engine.generate("a", stop="\udcff"),
        lambda engine: engine.generate("a", stop=["b", "\udcff"]),
        lambda engine: engine.generate("a", stop=b"b"),
        lambda engine: engine.generate("a", stop=7),
        lambda engine: engine.generate(b"abc"),
        lambda engine: engine.generate([]),
        lambda engine: engine.encode("\ud800"),
        lambda engine: Message("user", "a\udcff"),
    ],
)
def test_the_library_refuses_what_is_no_text(engine: Engine, ask: Callable[[Engine], Any]) -> None:
    with pytest.raises(UsageError):
        ask(engine)


def test_one_text_is_one_stop(engine: Engine) -> None:
    def said(stop: Any) -> tuple[str, str]:
        answer = engine.generate("x", SamplingSettings(), max_tokens=6, stop=stop)
        return "".join(piece.text for piece in answer), answer.stats.stop_reason

    whole, _ = said(())
    assert said(whole + "never") == said([whole + "never"]) == said(()) == said(None)
    assert said(whole[2:4])[1] == "stop"


def test_parts_and_text_are_one_prompt(engine: Engine) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "if?"}]
    ids = engine.encode([{"role": "user", "content": parts}])
    assert ids == engine.encode([Message("user", "What is if?")])
    call = {"function": {"name": "add", "arguments": "{}"}}
    with pytest.raises(UsageError, match="does not use tool_calls"):
        engine.encode([{"role": "assistant", "content": "", "tool_calls": [call]}])


# ---- a chat template of the user ------------------------------------------------------------


def test_a_chat_template_of_the_user(chat_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "mended.jinja"
    file.write_text("\ufeff{% for m in messages %}[{{ m.content }}]{% endfor %}", "utf-8")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{% for m in messages %}[{{ m.content }}]{% endfor %}"}))
    for path in (file, config):
        settings = EngineSettings(context=256, threads=1, chat_template=str(path))
        with Engine.open(chat_bundle, settings) as engine:
            assert engine.encode([Message("user", "hi")]) == engine.encode("[hi]")
    ways = run(chat_bundle, "--prompt", "hi", "--chat-template", file, "--json", *GREEDY)
    assert json.loads(ways.stdout)["num_prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.jinja", b"", "the file is empty"),
        ("a.jinja", b"\xff\xfe{\0", "not UTF-8 text.*UTF-16"),
        ("a.jinja", b"<!DOCTYPE html><html>", "a web page"),
        ("a.jinja", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        ("a.jinja", b"{% for m in messages %}{{ m", "does not parse"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b'{"chat_template": 7}', "must be text"),
        ("a.json", b"{}", "no chat template"),
        ("missing", None, "file is missing"),
        ("folder", None, "not a regular file"),
    ],
)
def test_a_file_that_is_no_template_is_refused(
    chat_bundle: Path, tmp_path: Path, name: str, data: bytes | None, what: str
) -> None:
    (tmp_path / "folder").mkdir()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    settings = EngineSettings(context=256, threads=1, chat_template=str(tmp_path / name))
    with pytest.raises(FormatError, match=what), Engine.open(chat_bundle, settings) as engine:
        engine.encode([Message("user", "hi")])
    result = run(chat_bundle, "--prompt", "hi", "--chat-template", tmp_path / name, *GREEDY)
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1


# ---- what /save writes, /load reads ---------------------------------------------------------


def conversation(engine: Any, *contents: str) -> Conversation:
    talk = Conversation(engine, SamplingSettings(), None, "be brief")
    talk.turns = [Message(("user", "assistant")[at % 2], text) for at, text in enumerate(contents)]
    return talk


@pytest.mark.parametrize(
    "contents",
    [
        ("x" * 1_100_000 + EMOJI, "ok"),
        (EMOJI * 400_000, "\x00\x01\u2028\ufeff"),
        tuple("[{" * 3 for _ in range(6000)),
        (),
    ],
)
def test_every_size_that_is_saved_is_loaded(contents: tuple[str, ...], tmp_path: Path) -> None:
    talk = conversation(None, *contents)
    talk.save(tmp_path / "talk.json")
    again = conversation(None)
    assert again.load(tmp_path / "talk.json")
    assert (again.system, again.turns) == (talk.system, talk.turns)


def test_a_long_talk_goes_along_with_the_cache(engine: Engine, tmp_path: Path) -> None:
    engine.prefill(engine.encode("hi"))
    talk = conversation(engine, "x" * 1_100_000 + EMOJI, "ok")
    talk.save(tmp_path / "talk.kv")
    again = conversation(engine)
    assert again.load(tmp_path / "talk.kv")
    assert again.turns == talk.turns


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation(None, "x" * 5000)
    monkeypatch.setattr(talks, "MAX_FILE_BYTES", 4000)
    for name in ("talk.json", "talk.kv"):
        with pytest.raises(UsageError, match="too long to be saved"):
            talk.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / "long.json").write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 5000}]}))
    with pytest.raises(UsageError, match=r"cannot be read.*too large"):
        talk.load(tmp_path / "long.json")


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("mine")
    with pytest.raises(UsageError, match="File exists"):
        conversation(None, "a").save(tmp_path / "talk.json")
    with pytest.raises(UsageError, match="cannot be saved"):
        conversation(None, "a").save(tmp_path / "nowhere" / "talk.json")
    assert (tmp_path / "talk.json").read_text() == "mine"


def test_a_byte_order_mark_before_a_saved_talk(tmp_path: Path) -> None:
    conversation(None, "a", "b").save(tmp_path / "talk.json")
    (tmp_path / "talk.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "talk.json").read_bytes())
    again = conversation(None)
    assert again.load(tmp_path / "talk.json")
    assert [turn.content for turn in again.turns] == ["a", "b"]


@pytest.mark.parametrize("where", ["system", "question"])
def test_half_a_character_leaves_the_talk_as_it_was(engine: Engine, where: str) -> None:
    talk = conversation(engine)
    change = partial(setattr, talk, "system") if where == "system" else talk.ask
    with pytest.raises(UsageError, match="not UTF-8"):
        change("a\udcff")
    assert (talk.system, talk.turns) == ("be brief", [])
    assert "".join(piece.text for piece in talk.ask("hi"))
