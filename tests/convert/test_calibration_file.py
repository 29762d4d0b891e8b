"""Damaged calibration files: HDF5 may raise anything, crash or hang, and the user reads one sentence."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from krasis.convert.conversion import prepare
from krasis.convert.importance import load_calibration
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.errors import FormatError, ResourceError
from krasis.formats.models.spec import ModelSpec
from krasis.formats.process.worker_process import WorkerLost, WorkerProcess


@pytest.fixture
def spec(hf_dir: Path, tmp_path: Path) -> ModelSpec:
    return prepare([hf_dir], tmp_path / "o", ConvertSettings(), Reporter(0)).plan.spec


@pytest.fixture
def path(spec: ModelSpec, tmp_path: Path) -> Path:
    """A sound file."""
    made = tmp_path / "calibration.h5"
    experts = spec.experts_of(0).count
    with h5py.File(made, "w") as file:
        for layer in range(len(spec.layers)):
            for name, size in (
                ("hidden", spec.hidden),
                ("intermediate", spec.experts_of(0).intermediate),
            ):
                file[f"layers/{layer}/{name}"] = np.full((experts, size), 0.5, np.float32)
    return made


def test_a_sound_file_is_read(path: Path, spec: ModelSpec) -> None:
    found = load_calibration(path, spec)
    assert len(found.layers) == len(spec.layers)
    hidden, intermediate = found.layers[0]
    assert hidden.shape == (spec.experts_of(0).count, spec.hidden)
    assert float(hidden.min()) == float(intermediate.max()) == 0.5


def test_damaged_files_are_refused(path: Path, spec: ModelSpec) -> None:
    sound, rng, refused = path.read_bytes(), random.Random(20261130), 0
    for size in (0, 100, 2000, None, None, None, None):
        data = bytearray(sound[:size])
        for _ in range(0 if size is not None else 40):
            data[rng.randrange(min(6000, len(data)))] = rng.randrange(256)
        path.write_bytes(bytes(data))
        try:
            load_calibration(path, spec)
        except FormatError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017  what is not refused is sound
            assert str(error).isprintable()  # noqa: PT017
    assert refused >= 4


def test_a_dataset_that_claims_terabytes(path: Path, spec: ModelSpec) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/0/hidden", (1 << 30, 1 << 12), "f4", chunks=(64, 64))
    with pytest.raises(FormatError, match="wrong shape"):
        load_calibration(path, spec)


@pytest.mark.parametrize(
    ("name", "text"), [("fifo", "a FIFO"), ("none", "missing"), ("", "a directory"), ("zero", "a device")]
)
def test_what_is_no_file_is_refused(name: str, text: str, spec: ModelSpec, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(FormatError, match=text):
        load_calibration(tmp_path / name, spec)


@pytest.mark.parametrize("reason", ["it crashes (SIGSEGV)", "it takes more than 2 s"])
def test_a_library_that_is_lost(
    reason: str, path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object, **__: object) -> None:
        raise WorkerLost(reason)

    monkeypatch.setattr(WorkerProcess, "call", lose)
    with pytest.raises(FormatError, match=re.escape(reason)):
        load_calibration(path, spec)


def test_a_file_that_may_not_be_read(path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceError, match="Permission denied"):
        load_calibration(path, spec)
