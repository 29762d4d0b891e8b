"""Builders of small files for the tests of formats."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

import format_builders


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small complete bundle."""
    return format_builders.write_bundle(tmp_path / "model.krasis")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """(name, bytes) -> the path of a new file."""

    def write_file(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write_file
