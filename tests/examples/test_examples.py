"""The programs in examples/ run as their first lines say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from krasis.runtime.planning.presets import SHAPES

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-qwen3-moe"


def run(*arguments: str | Path, given: str = "") -> str:
    """A Python program in a process of its own; gives its stdout."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed model as a bundle with CPU experts."""
    path = tmp_path_factory.mktemp("examples") / "tiny.krasis"
    code = "from krasis.convert.cli import main; main()"
    run("-c", code, TINY, "-o", path, "--tiers", "cpu", "--quiet")
    return path


def test_generate_streams_an_answer_of_the_asked_length(bundle: Path) -> None:
    out = run(ROOT / "examples" / "generate.py", bundle, "What is a list?", "--max-tokens", "5")
    assert re.search(r"\[(length: 5|end: [0-4]) tokens\]\n$", out), out


def test_generate_is_cancelled_by_its_timer(bundle: Path) -> None:
    out = run(ROOT / "examples" / "generate.py", bundle, "What is a list?", "--seconds", "0")
    assert "[cancelled: " in out


def test_chat_computes_only_what_is_new(bundle: Path) -> None:
    given = "What is a list?\nAnd a tuple?\n"
    out = run(ROOT / "examples" / "chat.py", bundle, "--context", "512", "--max-tokens", "8", given=given)
    first, second = (line.split() for line in out.splitlines() if line.endswith("were cached]"))
    assert first[0] == "[0"
    assert int(second[0].removeprefix("[")) >= int(first[2])  # at least the first prompt


def test_prefix_is_read_once_and_asked_later(bundle: Path, tmp_path: Path) -> None:
    document, prefix = tmp_path / "report.txt", tmp_path / "report.kv"
    document.write_text("A list is a sequence of items that can be changed.\n" * 5)
    saved = run(ROOT / "examples" / "prefix.py", bundle, "read", document, prefix)
    asked = run(ROOT / "examples" / "prefix.py", bundle, "ask", document, prefix, "What is a list?")
    num_tokens = saved.removeprefix("saved ").split()[0]
    assert int(num_tokens) > 20
    assert asked.endswith(f"[{num_tokens} tokens came from the file]\n")


def test_plan_compares_machines_without_any_of_them() -> None:
    lines = run(ROOT / "examples" / "plan.py").splitlines()
    assert len(lines) == 4 * len(SHAPES)
    assert all("tok/s" in line or "GB" in line for line in lines)
