"""``krasis COMMAND``."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from krasis.formats.process import umbrella
from krasis.formats.process.tool import tool_version

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from krasis.formats.process.umbrella import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("name", umbrella.COMMANDS)
def test_every_command_is_there_with_help_and_version(name, capsys):
    command = importlib.import_module(umbrella.COMMANDS[name][0]).main
    assert isinstance(command, click.Command)
    for option, text in (("--help", f"Usage: krasis {name}"), ("--version", f"krasis {name}, version ")):
        with pytest.raises(SystemExit) as ending:
            umbrella.main([name, option])
        assert ending.value.code == 0
        assert text in capsys.readouterr().out


def test_itself(capsys):
    umbrella.main([])
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in umbrella.COMMANDS)
    umbrella.main(["--help"])
    assert capsys.readouterr().out == shown
    umbrella.main(["--version"])
    assert capsys.readouterr().out == f"krasis, version {tool_version()}\n"


@pytest.mark.parametrize("word", ["conver", "--nonsense", "\x1b[2J"])
def test_an_unknown_command(word, capsys):
    with pytest.raises(SystemExit) as ending:
        umbrella.main([word])
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert "there are convert, run, serve, info, bench" in error
    assert "\x1b" not in error


def test_exit_codes_are_those_of_the_command():
    done = run("info", "/nowhere.krasis")
    assert done.returncode == 3
    assert "/nowhere.krasis" in done.stderr


def test_the_separate_commands_are_the_same():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, (module, _) in umbrella.COMMANDS.items():
        if name != "bench":
            assert scripts[f"krasis-{name}"] == f"{module}:main"
    assert scripts["krasis"] == "krasis.formats.process.umbrella:main"
