"""Tiny random models on disk, and their conversion."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

from convert_model import Model
from convert_runs import Bundle, run_conversion, tree_digests
from convert_shape import Shape


@pytest.fixture(scope="session")
def model_class() -> type[Model]:
    """For tests that need models of their own."""
    return Model


@pytest.fixture(scope="session")
def shape_class() -> type[Shape]:
    """Likewise shapes."""
    return Shape


@pytest.fixture(scope="session")
def model() -> Model:
    """The usual tiny model."""
    return Model(Shape())


@pytest.fixture(scope="session")
def hf_dir(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint: BF16 in two shards. Read-only: tests that change it make a copy."""
    return model.write_hf(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="session")
def q8_gguf(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its Q8_0 GGUF."""
    return model.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf")


@pytest.fixture(scope="session")
def run() -> Callable[..., Bundle]:
    """``run(paths, out, io=None, **settings)``."""
    return run_conversion


@pytest.fixture(scope="session")
def digests_of() -> Callable[[Path], dict[str, str]]:
    """``tree_digests``."""
    return tree_digests


@pytest.fixture(scope="session")
def bundle(hf_dir: Path, q8_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The usual model converted with the usual settings. Read-only."""
    return run_conversion([hf_dir, q8_gguf], tmp_path_factory.mktemp("bundle") / "tiny.krasis")


@pytest.fixture
def fast_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests sync thousands of times."""
    shared = Path("/dev/shm")  # noqa: S108
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="krasis-test-") as folder:
        yield Path(folder)
