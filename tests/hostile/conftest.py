"""What every hostile file must meet: one clear sentence, little memory, little time."""

from __future__ import annotations

import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.extend(
    str(Path(__file__).parents[1] / place / "support") for place in ("formats", "fuzz", "hostile")
)

import format_builders

from krasis.formats.errors import FormatError, KrasisError
from krasis.formats.models.registry import all_families

all_families()  # modules that a reader loads at its first use are not what a file made it allocate

MAX_SECONDS = 5.0
FREE_BYTES = 1 << 20


@pytest.fixture
def refuses(tmp_path: Path) -> Callable[..., KrasisError]:
    """refuses(action, "part of the sentence", ..., header_bytes=n, error=FormatError) -> the error.

    The action must raise exactly that class of error, name the file (anything below tmp_path) or the given
    place, and allocate less than twice the header and a MiB.
    """

    def check(
        action: Callable[[], Any],
        *parts: str,
        header_bytes: int,
        error: type[KrasisError] = FormatError,
        where: str = "",
    ) -> KrasisError:
        start = time.process_time()
        tracemalloc.start()
        try:
            with pytest.raises(KrasisError) as caught:
                action()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        sentence = str(caught.value)
        assert type(caught.value) is error, sentence
        assert sentence.startswith(where or str(tmp_path)), sentence
        assert "\n" not in sentence
        assert sentence.isprintable(), ascii(sentence)
        assert len(sentence) < 1000
        for part in parts:
            assert part in sentence
        assert peak < 2 * header_bytes + FREE_BYTES, f"{peak} bytes for a header of {header_bytes}"
        assert time.process_time() - start < MAX_SECONDS
        return caught.value

    return check


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """(name, bytes) -> the path of a new file."""

    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.fixture(scope="session")
def sound_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; tests work on copies."""
    return format_builders.write_bundle(tmp_path_factory.mktemp("sound") / "model.krasis")


@pytest.fixture
def bundle(sound_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a sound bundle, to be made unsound."""
    return shutil.copytree(sound_bundle, tmp_path / "model.krasis")
