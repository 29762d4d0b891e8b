"""What was never written of a source is found before any work, a dry run included."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from krasis.convert.cli import main
from krasis.convert.conversion import prepare
from krasis.convert.holes import file_holes
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.errors import FormatError


def unwritten_end(path: Path, share: float) -> None:
    """The file as a download leaves it that reserved the size and broke off."""
    data = path.read_bytes()
    with path.open("wb") as file:
        file.write(data[: int(len(data) * share)])
        file.truncate(len(data))
    if not list(file_holes(path)):
        pytest.skip("this file system has no holes")


@pytest.fixture
def sources(hf_dir: Path, q8_gguf: Path, tmp_path: Path) -> dict[str, Path]:
    copy = tmp_path / "model.gguf"
    shutil.copy(q8_gguf, copy)
    folder = tmp_path / "hf"
    shutil.copytree(hf_dir, folder)
    return {"gguf": copy, "hf": folder}


@pytest.mark.parametrize("kind", ["gguf", "hf"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_dry_run_finds_an_unwritten_end(
    kind: str, share: float, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[kind]
    unwritten_end(source if kind == "gguf" else sorted(source.glob("*.safetensors"))[-1], share)
    out = tmp_path / "out.krasis"
    arguments = [str(source), "-o", str(out), "--gpu-group", "64", "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == FormatError.exit_code
    assert "the weights look damaged" in result.output
    assert not list(tmp_path.glob("out*"))
    assert CliRunner().invoke(main, [*arguments, "--force-weights"]).exit_code == 0


def test_a_hole_where_a_model_is_zero_is_none(
    model: Any, model_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = dict(model.weights)
    for part in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.experts.3.{part}_proj.weight"
        weights[name] = 0 * weights[name]
    source = model_class(model.shape, weights=weights).write_hf(tmp_path / "hf", num_files=1)
    size = (source / "model.safetensors").stat().st_size
    # As thin copies have it, and a file system that says so of everything: the weights decide.
    monkeypatch.setattr("krasis.convert.holes.file_holes", lambda path: [(0, size)])
    prepare([source], tmp_path / "out.krasis", ConvertSettings(gpu_group=64), Reporter(0))


def test_a_written_file_has_no_holes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300_000))
    assert not list(file_holes(path))
    assert not list(file_holes(Path(os.devnull)))
