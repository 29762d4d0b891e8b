"""The stress run: a short one finds nothing, and it does find an engine that lets its callers mix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.runtime.exclusive import Claim
from scripts import stress_engine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stress") / "tiny.krasis"
    reporter = Reporter(0)
    convert(prepare([ROOT / "tests/assets/tiny-qwen3-moe"], out, ConvertSettings(), reporter), reporter)
    return out


def test_a_short_run_is_right(bundle: Path) -> None:
    result = stress_engine.stress(bundle, 4.0, num_threads=4, seed=3, engine_threads=2)
    assert result.failures == []
    assert result.ends["length"]  # answers were read to their end
    assert result.ends["overtaken or closed"]


def test_answers_that_mix_are_found(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Claim, "go_on", Claim.begin)
    result = stress_engine.stress(bundle, 20.0, num_threads=4, seed=3, engine_threads=2)
    assert "instead of" in result.failures[0]


def test_the_command_counts_and_ends_with_zero(bundle: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/stress_engine.py"), str(bundle), "--minutes", "0.01"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n0 failures\n")
