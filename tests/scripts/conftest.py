"""What the tests of scripts share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Options of scripts/bench/run.py that keep all it writes below tmp_path."""
    options = {"--record": "r.h5", "--out": "B.md", "--work": "w"}
    return [part for option, name in options.items() for part in (option, str(tmp_path / name))]
