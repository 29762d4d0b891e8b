"""Ranks as processes: forks of one helper, so that torch is imported once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def fork_ranks(tmp_path_factory) -> Callable[..., Path]:
    """("case:number of ranks", ...) of rank_cases.py -> the folder in which each has a folder, CASE_NUMBER.

    check: no rank may fail.
    """

    def run(*runs: str, check: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        flags = ["-O"] if sys.flags.optimize else []
        command = [sys.executable, *flags, HERE / "fork_ranks.py", folder, *runs]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
        if check and done.returncode:
            raise AssertionError(f"{done.returncode} ranks failed:\n{done.stdout}\n{done.stderr}")
        return folder

    return run
