"""A conversion killed or failing at any point leaves its output absent, resumable or complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from krasis.convert.journal import JOURNAL_NAME
from krasis.formats.errors import ResourceError
from krasis.formats.files.file_ops import FileOps

SETTINGS = {"gpu_group": 64}
CALLS = [name for name in vars(FileOps) if not name.startswith("_")]


def _counted(name):
    def call(self, *arguments):
        if name == "close":
            FileOps.close(self, *arguments)  # Linux closes the descriptor even when close fails
        self.count_one(name)
        if name in ("fsync", "fdatasync", "close"):
            return None  # durability is not what these tests are about, and it is slow
        return getattr(FileOps, name)(self, *arguments)

    return call


class FaultyOps(FileOps):
    """Fails at one call (``once``) or from that call on (a dead disk)."""

    def __init__(self, fail_at: int, code: int, *, once: bool) -> None:
        self.count, self.fail_at, self.code, self.once = 0, fail_at, code, once
        self.failed: list[str] = []

    def count_one(self, name: str) -> None:
        count, self.count = self.count, self.count + 1
        if count == self.fail_at or (not self.once and count > self.fail_at >= 0):
            self.failed.append(name)
            raise OSError(self.code, os.strerror(self.code))


for _name in CALLS:
    setattr(FaultyOps, _name, _counted(_name))


class ShortWrites(FileOps):
    """Writes at most 1000 bytes a call, and syncs nothing."""

    def pwrite(self, fd, data, offset):
        return super().pwrite(fd, bytes(data[:1000]) if len(data) < 5000 else data[: len(data) // 2], offset)


@pytest.fixture(scope="module")
def small(model_class, shape_class, tmp_path_factory):
    """The smallest model, to convert thousands of times."""
    folder = tmp_path_factory.mktemp("small")
    shape = shape_class(layers=1, experts=2, hidden=64, heads=2, kv_heads=1, intermediate=64, vocab=40)
    model = model_class(shape)
    return [model.write_hf(folder / "hf", tokenizer=False), model.write_gguf(folder / "small-q8_0.gguf")]


@pytest.fixture(scope="module")
def expected(run, small, tmp_path_factory):
    return run(small, tmp_path_factory.mktemp("small-out") / "small.krasis", **SETTINGS).files()


def check_state(out: Path, expected, digests_of, old=None):
    """The output is absent, the old one, or whole; leftovers are in the partial folder only."""
    names = {path.name for path in out.parent.iterdir()}
    assert names <= {out.name, f"{out.name}.partial", f"{out.name}.replaced"}
    if not out.exists():
        assert old is None or (out.parent / f"{out.name}.replaced").exists()
        return
    found = digests_of(out)
    found.pop(JOURNAL_NAME, None)  # its removal is the very last step; readers ignore it
    assert found in (expected, old)


def test_short_writes_change_nothing(run, small, expected, fast_dir):
    assert run(small, fast_dir / "out.krasis", io=ShortWrites(), **SETTINGS).files() == expected


def test_an_io_error_at_every_call(run, small, expected, digests_of, fast_dir):
    counter = FaultyOps(-1, errno.EIO, once=True)
    out = fast_dir / "out.krasis"
    run(small, out, io=counter, **SETTINGS)
    remove(out)
    num_calls, failed = counter.count, set()
    assert num_calls > 60
    for index in range(num_calls):
        # A passing error at this call, then a full and dead disk at another call of the resumed run.
        attempts = [
            FaultyOps(index, errno.EIO, once=True),
            FaultyOps((7 * index + 3) % num_calls, errno.ENOSPC, once=False),
        ]
        for io in attempts:
            if out.exists():
                break
            with suppress_io_error(io):
                run(small, out, io=io, **SETTINGS)
            failed.update(io.failed)
            check_state(out, expected, digests_of)
        if not out.exists():
            run(small, out, **SETTINGS)
        found = digests_of(out)
        found.pop(JOURNAL_NAME, None)
        assert found == expected
        assert not Path(f"{out}.partial").exists()
        remove(out)
    assert {"open", "pwrite", "fallocate", "rename", "rename_noreplace", "mkdir", "fdatasync"} <= failed


@contextmanager
def suppress_io_error(io: FaultyOps):
    """The injected error may come out, as a sentence, and no other."""
    try:
        yield
    except ResourceError as error:
        if not io.failed or os.strerror(io.code) not in str(error):
            raise


def test_an_io_error_while_replacing(run, small, expected, digests_of, fast_dir, tmp_path):
    out = fast_dir / "out.krasis"
    older = run(small, tmp_path / "old.krasis", **{**SETTINGS, "cpu_format": "int4"}).path
    old = digests_of(older)
    shutil.copytree(older, out)
    counter = FaultyOps(-1, errno.EIO, once=True)
    run(small, out, io=counter, replace=True, **SETTINGS)
    assert digests_of(out) == expected
    for index in range(counter.count - 20, counter.count):
        remove(out)
        shutil.copytree(older, out)
        with pytest.raises(ResourceError):
            run(
                small, out, io=FaultyOps(index, errno.EIO, once=False), replace=True, restart=True, **SETTINGS
            )
        check_state(out, expected, digests_of, old)
        run(small, out, replace=True, restart=True, **SETTINGS)
        assert digests_of(out) == expected
        assert not Path(f"{out}.partial").exists()


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_killed_at_a_hundred_random_moments_and_at_every_call(small, expected, fast_dir):
    script = Path(__file__).with_name("kill_server.py")
    command = [sys.executable, script, *small, fast_dir / "out.krasis", "100", "60", "2"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["wrong"] == [], result.stderr
    assert report["reference"] == expected
    assert report["leftovers"] == []
    assert report["killed"] >= 140
    # Else the kills came before or after the interesting time.
    assert report["resumable"] >= 20
    assert report["completed"] >= 2
