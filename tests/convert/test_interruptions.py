"""A conversion that is killed, or that meets an I/O error, at any point: afterwards absent, resumable or complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from krasis.convert.journal import JOURNAL_NAME
from krasis.formats.errors import KrasisError, ResourceError
from krasis.formats.file_ops import FileOps

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
    paths = [model.write_hf(folder / "hf", tokenizer=False), model.write_gguf(folder / "small-q8_0.gguf")]
    return paths


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
            try:
                run(small, out, io=io, **SETTINGS)
            except KrasisError as error:
                assert isinstance(error, ResourceError), error
                assert io.failed
                assert os.strerror(io.code) in str(error)
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


KILLER = r"""
import json, os, random, signal, sys, time
from pathlib import Path
from io import StringIO
import xxhash
from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
import krasis.convert.pipeline

hf, gguf, out, kills, seed = sys.argv[1:]
paths, out, rng = [Path(hf), Path(gguf)], Path(out), random.Random(int(seed))
reporter = lambda: Reporter(0, StringIO())

def once():
    if out.exists():
        return
    convert(prepare(paths, out, ConvertSettings(gpu_group=64), reporter()), reporter())

def start():
    # The child is made before any thread of the parent: the parent never converts.
    pid = os.fork()
    if pid == 0:
        try:
            once()
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(9)
        os._exit(0)
    return pid

def digests():
    return {p.name: xxhash.xxh3_128_hexdigest(p.read_bytes()) for p in out.iterdir() if p.name != "journal.jsonl"}

def remove():
    for p in out.iterdir():
        p.unlink()
    out.rmdir()

begin = time.monotonic()
assert os.waitpid(start(), 0)[1] == 0
usual_s = time.monotonic() - begin
remove()
killed = resumed = completed = 0
wrong = []
while killed < int(kills):
    pid = start()
    time.sleep(rng.uniform(0, usual_s))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        killed += 1
    elif status != 0:
        wrong.append(f"exit status {status}")
        break
    names = {p.name for p in out.parent.iterdir()} - {out.name, out.name + ".partial"}
    if names:
        wrong.append(sorted(names))
    partial = out.with_name(out.name + ".partial")
    journal = partial / "journal.jsonl"
    resumed += journal.exists() and journal.read_bytes().count(b"\n") > 1
    if out.exists():
        found = digests()
        completed += 1
        remove()
        yield_ = found
        if "reference" not in globals():
            reference = found
        if found != reference:
            wrong.append(sorted(k for k in {*found, *reference} if found.get(k) != reference.get(k)))
if os.waitpid(start(), 0)[1] != 0:
    wrong.append("the last run failed")
print(json.dumps({"killed": killed, "resumed": int(resumed), "completed": completed, "wrong": wrong, "final": digests()}))
"""


def test_killed_at_a_hundred_random_moments(small, expected, fast_dir):
    command = [sys.executable, "-c", KILLER, *map(str, small), str(fast_dir / "out.krasis"), "100", "2"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["wrong"] == [], result.stderr
    assert report["killed"] == 100
    assert report["final"] == expected
    # Else the kills came before or after the interesting time.
    assert report["resumed"] >= 10
