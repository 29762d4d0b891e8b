"""The files that run krasis-serve, and its documentation: what they say is what the command reads."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from krasis.runtime.server.command import main

ROOT = Path(__file__).parents[2]
SERVICE = (ROOT / "examples" / "krasis-serve.service").read_text("utf-8")
DOCKERFILE = (ROOT / "examples" / "Dockerfile").read_text("utf-8")
SERVER_MD = (ROOT / "docs" / "SERVER.md").read_text("utf-8")


def options(command: str | list[str]) -> dict[str, Any]:
    """What krasis-serve reads of a command line; a wrong option ends the test."""
    words = shlex.split(command) if isinstance(command, str) else command
    assert Path(words[0]).name == "krasis-serve"
    return main.make_context("krasis-serve", words[1:]).params


def fenced(language: str) -> list[str]:
    """The blocks of one language in the documentation."""
    return re.findall(rf"^```{language}\n(.*?)^```$", SERVER_MD, re.MULTILINE | re.DOTALL)


def test_the_service_starts_the_server_and_lets_it_end() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # names in systemd have cases
    unit.read_string(SERVICE)
    service = unit["Service"]
    found = options(service["ExecStart"])
    assert found["bundle"] == Path("/srv/models/model.krasis")
    assert found["host"] == "127.0.0.1"
    assert str(found["api_key_file"]) == "${CREDENTIALS_DIRECTORY}/keys"
    assert service["LoadCredential"].startswith("keys:")
    assert str(found["prefix_dir"]) == "${STATE_DIRECTORY}/prefixes"
    assert int(service["TimeoutStopSec"]) >= 120
    assert service["KillMode"] == "mixed"
    assert service["OOMPolicy"] == "continue"
    assert service["LimitMEMLOCK"] == "infinity"
    # What is read of this machine is in /proc outside the processes.
    assert "ProcSubset" not in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_knows_every_line_of_the_service(tmp_path: Path) -> None:
    unit = tmp_path / "krasis-serve.service"
    program = tmp_path / "krasis-serve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit.write_text(SERVICE.replace("/opt/krasis/bin/krasis-serve", str(program)), "utf-8")
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    complaints = [line for line in found.stderr.splitlines() if unit.name in line]
    assert (found.returncode, complaints) == (0, [])


def test_the_container_starts_the_server_as_nobody_special() -> None:
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    last = {line.split()[0]: line.partition(" ")[2].strip() for line in lines if line[:1].isupper()}
    found = options(json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"]))
    assert (found["host"], found["port"], str(found["prefix_dir"])) == ("0.0.0.0", 8080, "/prefixes")  # noqa: S104
    assert last["USER"] == "krasis"
    health = last["HEALTHCHECK"].partition("CMD ")[2]
    assert "127.0.0.1:8080/health" in json.loads(health)[-1]
    compile(json.loads(health)[-1], "health", "exec")
    assert ":latest" not in DOCKERFILE


def test_the_container_is_built_of_all_that_the_wheel_needs() -> None:
    ignored = (ROOT / "examples" / "Dockerfile.dockerignore").read_text("utf-8").split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    needed = {"CMakeLists.txt", "pyproject.toml", "csrc", project["project"]["readme"]}
    needed |= {
        *project["project"]["license-files"],
        *project["tool"]["scikit-build"]["wheel"]["packages"].values(),
    }
    assert ignored[0] == "*"
    assert {name[1:] for name in ignored if name.startswith("!")} == needed
    assert all((ROOT / name).exists() for name in needed)


def test_commands_in_the_documentation_are_commands() -> None:
    found = re.findall(r"^ {4}(krasis-serve .*)$", SERVER_MD, re.MULTILINE)
    assert len(found) >= 1
    for line in found:
        options(line.partition("#")[0])
    for option in set(re.findall(r"`(--[a-z-]+)[ `]", SERVER_MD)):
        known = {name for one in main.params for name in [*one.opts, *one.secondary_opts]}
        assert option in known | CLIENTS_OPTIONS, option


# Of other programs that the documentation names.
CLIENTS_OPTIONS = {"--model", "--ulimit"}


@pytest.mark.parametrize(("language", "parse"), [("json", json.loads), ("toml", tomllib.loads)])
def test_settings_of_clients_are_well_formed(language: str, parse: Any) -> None:
    assert fenced(language)
    for block in fenced(language):
        assert parse(block)
