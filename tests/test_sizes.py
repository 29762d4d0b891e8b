"""Files up to 400 lines and functions up to 50, as CONTRIBUTING.md says, of all that is not a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 50
FOLDERS = ("formats", "convert", "runtime", "csrc", "scripts", "examples")
SUFFIXES = (".py", ".h", ".cuh", ".cpp", ".cu", ".sh")


def sources(folder: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes and path.is_file())


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_are_short(folder: str) -> None:
    assert sources(folder)
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(folder)}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def long_functions(path: Path) -> dict[str, int]:
    """Lines of the functions that are too long, counted without decorators and docstring."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            rest = node.body[1:] if ast.get_docstring(node) is not None else node.body
            first = (rest or node.body)[0]
            if (lines := (node.end_lineno or 0) - first.lineno + 1) > MAX_FUNCTION_LINES:
                found[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    return found


@pytest.mark.parametrize("folder", ["formats", "convert", "runtime", "scripts"])
def test_functions_are_short(folder: str) -> None:
    found: dict[str, int] = {}
    for path in sources(folder, (".py",)):
        found |= long_functions(path)
    assert found == {}
