"""Nothing of the product rests on what ``python -O`` leaves out: ``assert`` and ``__debug__``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def of_debugging(tree: ast.Module) -> list[int]:
    """The lines of what only exists without -O."""
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Name) and node.id == "__debug__")
    )


@pytest.mark.parametrize("package", ["formats", "convert", "runtime"])
def test_nothing_rests_on_asserts(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): of_debugging(ast.parse(path.read_text())) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_it_would_be_found() -> None:
    tree = ast.parse("if __debug__:\n    x = 1\n\nassert x")
    assert of_debugging(tree) == [1, 4]
