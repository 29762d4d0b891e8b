"""What messages tell people to type exists: every ``--option`` they name is one of the command meant."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from krasis.convert.cli import main as convert_main
from krasis.runtime.cli.importance_command import main as importance_main
from krasis.runtime.cli.info_command import main as info_main
from krasis.runtime.cli.run import main as run_main
from krasis.runtime.server.command import main as serve_main

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, click.Command] = {
    "krasis-run": run_main,
    "krasis-info": info_main,
    "krasis-convert": convert_main,
    "importance_command": importance_main,
    "krasis-serve": serve_main,
}
# Whose options a message means if it names no command.
OWN_COMMAND = {
    "runtime/cli/info_command.py": "krasis-info",
    "runtime/cli/info_plan.py": "krasis-info",
    "runtime/cli/importance_command.py": "importance_command",
    "runtime/planning/planner.py": "krasis-info",  # make_workload, which krasis-info alone calls
    "runtime/planning/formats.py": "krasis-info",
    "runtime/planning/named_parts.py": "krasis-info",
    "runtime/planning/presets.py": "krasis-info",
    "runtime/planning/probes.py": "krasis-info",
    "convert": "krasis-convert",
    "formats": "krasis-convert",
    "runtime/server": "krasis-serve",
    "runtime/serving": "krasis-serve",
    "runtime": "krasis-run",
}
# Of docker, torchrun, llama-gguf-split and hf download, which the messages name.
FOREIGN = {"--ulimit", "--nproc-per-node", "--merge", "--local-dir"}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]\b")
COMMAND = re.compile("krasis-(?:run|info|convert|serve)")


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is neither a docstring nor the declaration of an option."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            texts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            yield node.lineno, "…".join(str(text) for text in texts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def unknown_options(path: str, text: str) -> list[str]:
    """Options that the command named last before them, or the module's own, does not have."""
    if OPTION.fullmatch(text):
        return []
    own = next(command for place, command in OWN_COMMAND.items() if path.startswith(place))
    found = []
    for match in OPTION.finditer(text):
        named = COMMAND.findall(text[: match.start()])
        command = COMMANDS[named[-1] if named else own]
        options = {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts}
        if match.group() not in options | FOREIGN:
            found.append(match.group())
    return found


@pytest.mark.parametrize("package", ["runtime", "formats", "convert"])
def test_every_option_that_is_named_exists(package: str) -> None:
    wrong, num_options = [], 0
    for file in sorted((ROOT / package).rglob("*.py")):
        path = str(file.relative_to(ROOT))
        for line, text in messages(file):
            num_options += len(OPTION.findall(text))
            wrong += [f"{path}:{line}: {option}" for option in unknown_options(path, text)]
    assert not wrong
    assert num_options or package == "formats"


def test_the_check_sees_what_is_wrong() -> None:
    place = "runtime/planning/placement.py"
    assert unknown_options(place, "a shorter --context") == ["--context"]
    assert unknown_options(place, "a shorter one (krasis-run --ctx, krasis-info --context)") == []
    assert unknown_options(place, "a shorter one (krasis-run --context)") == ["--context"]
    assert unknown_options("runtime/cli/info_command.py", "--plan --shape NAME, or --ctx") == ["--ctx"]
