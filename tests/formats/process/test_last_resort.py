"""What nobody foresaw ends a command in one sentence and the right exit code."""

from __future__ import annotations

import threading

import click
import pytest

from krasis.formats.errors import FormatError
from krasis.formats.process import last_resort as module
from krasis.formats.process.last_resort import EXIT_FAULT, last_resort


class PanicException(BaseException):
    """What a library in Rust raises."""


def run(error: BaseException, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...] = ()) -> int:
    @last_resort("krasis-x")
    def command() -> None:
        raise error

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    monkeypatch.setattr(module.sys, "argv", ["krasis-x", *arguments])
    with pytest.raises(SystemExit) as caught:
        command()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (TypeError("unhashable type: 'list'"), EXIT_FAULT, "TypeError: unhashable"),
        (KeyError("a\x1b[2J\nb"), EXIT_FAULT, "please report"),
        (RecursionError("maximum recursion depth exceeded"), EXIT_FAULT, "RecursionError"),
        (AssertionError(), EXIT_FAULT, "AssertionError"),
        (PanicException("index out of bounds"), EXIT_FAULT, "PanicException: index"),
        (MemoryError(), 6, "out of memory"),
        (OSError(28, "No space left on device", "/x/\x1b"), 6, "No space left on device"),
        (OSError("odd"), 6, "odd"),
        (FormatError("damaged"), 3, "damaged"),
    ],
)
def test_one_sentence(
    error: BaseException,
    code: int,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(error, monkeypatch) == code
    told = capsys.readouterr().err
    assert told.startswith("krasis-x: ")
    assert part.lower() in told.lower()
    assert told.count("\n") == 1
    assert told.removesuffix("\n").isprintable()


def test_the_traceback_is_there_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(ValueError("x"), monkeypatch, ("-v",))
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("KRASIS_TRACEBACK", "1")
    run(ValueError("x"), monkeypatch)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [SystemExit(4), KeyboardInterrupt(), click.UsageError("x"), click.Abort(), BrokenPipeError()],
)
def test_what_is_no_failure_passes(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    @last_resort("krasis-x")
    def command() -> None:
        raise error

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with pytest.raises(type(error)):
        command()


def test_a_thread_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def fail() -> None:
        raise ValueError("in a thread")

    @last_resort("krasis-x")
    def command() -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    command()
    told = capsys.readouterr().err
    assert "in a thread" in told
    assert "Traceback" not in told


def test_closed_streams_do_not_make_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "stderr", None)
    assert run(ValueError("x"), monkeypatch) == EXIT_FAULT


@pytest.mark.parametrize(
    ("module_name", "inner", "arguments"),
    [
        ("krasis.runtime.cli.run", "_run", ["x.krasis", "--prompt", "hi"]),
        ("krasis.runtime.cli.info_command", "_run", ["x.krasis"]),
        ("krasis.convert.cli", "_run", ["x", "-o", "y"]),
    ],
)
def test_every_command_has_it(
    module_name: str, inner: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    from click.testing import CliRunner

    command = importlib.import_module(module_name)

    def fail(*_: object, **__: object) -> None:
        raise PanicException("a panic")

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(command, inner, fail)
    result = CliRunner().invoke(command.main, arguments)
    assert result.exit_code == EXIT_FAULT
    assert "a panic" in result.stderr
    assert "Traceback" not in result.output
