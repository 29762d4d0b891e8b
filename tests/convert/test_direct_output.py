"""Conversions whose shards are written past the page cache: the same bytes, whatever is refused or fails."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from krasis.convert.cli import main
from krasis.formats.errors import ResourceError
from krasis.formats.files.aligned import is_page_aligned
from krasis.formats.files.file_ops import FileOps
from krasis.formats.limits import PAGE_BYTES

# Buffers of one expert: many small writes instead of a few large ones.
SETTINGS = {"gpu_group": 64, "memory_limit_bytes": 456 << 20}


class Disk(FileOps):
    """Takes direct writes as a disk of 4 KiB sectors would, wherever the test runs, and syncs nothing.

    At the direct write number fail_at (from 0) it fails with ``code``; ``dead``: and at every call after it.
    """

    def __init__(self, fail_at: int | None = None, code: int = errno.EIO, *, dead: bool = False) -> None:
        self.fail_at, self.code, self.dead = fail_at, code, dead
        self.direct: set[int] = set()
        self.num_direct = 0
        self.has_failed = False

    def open(self, path, flags, mode=0o644):
        self._check()
        fd = super().open(path, flags & ~os.O_DIRECT, mode)
        (self.direct.add if flags & os.O_DIRECT else self.direct.discard)(fd)
        return fd

    def pwrite(self, fd, data, offset):
        self._check()
        if fd in self.direct:
            if self.num_direct == self.fail_at:
                self.has_failed = True
                raise OSError(self.code, os.strerror(self.code))
            if offset % PAGE_BYTES or len(data) % PAGE_BYTES or not is_page_aligned(memoryview(data)):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self.num_direct += 1
        return super().pwrite(fd, data, offset)

    def fsync(self, fd):
        self._check()

    def fdatasync(self, fd):
        self._check()

    def _check(self) -> None:
        if self.dead and self.has_failed:
            raise OSError(self.code, os.strerror(self.code))


@pytest.fixture(scope="module")
def inputs(model_class, shape_class, tmp_path_factory):
    """Large enough that both tiers' blobs and a dense one have whole pieces of 2 MiB."""
    folder = tmp_path_factory.mktemp("model")
    shape = shape_class(
        layers=1, experts=16, hidden=256, heads=2, kv_heads=1, intermediate=1024, vocab=9000, head_dim=32
    )
    model = model_class(shape)
    return [model.write_hf(folder / "hf", tokenizer=False), model.write_gguf(folder / "m-q8_0.gguf")]


@pytest.fixture(scope="module")
def expected(run, inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("buffered") / "m.krasis"
    return run(inputs, out, output_io="buffered", gpu_group=64).files()


@pytest.fixture(scope="module")
def num_direct(run, inputs, expected, tmp_path_factory) -> int:
    """Direct writes of a whole conversion, which gives the same bytes as one through the page cache."""
    disk = Disk()
    bundle = run(inputs, tmp_path_factory.mktemp("direct") / "m.krasis", io=disk, **SETTINGS)
    assert bundle.files() == expected
    assert bundle.summary.output_io == "direct writes"
    assert disk.num_direct >= 10
    return disk.num_direct


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_same_bytes_on_the_file_system_of_this_machine(
    run, inputs, expected, fast_dir, tmp_path, num_threads
):
    for folder in (fast_dir, tmp_path):
        bundle = run(inputs, folder / "m.krasis", gpu_group=64, num_threads=num_threads)
        assert bundle.files() == expected


def test_an_error_at_every_direct_write(run, inputs, expected, num_direct, fast_dir):
    out = fast_dir / "m.krasis"
    for fail_at in range(num_direct):
        with pytest.raises(ResourceError, match="Input/output error"):
            run(inputs, out, io=Disk(fail_at, dead=fail_at % 2 == 0), **SETTINGS)
        assert not out.exists()
        # What one way of writing left is continued by the other.
        bundle = run(inputs, out, io=Disk(), output_io=("auto", "buffered")[fail_at // 2 % 2], **SETTINGS)
        assert bundle.files() == expected
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


def test_killed_at_random_moments_on_the_file_system_of_this_machine(inputs, expected, tmp_path):
    script = Path(__file__).with_name("kill_server.py")
    command = [sys.executable, script, *inputs, tmp_path / "m.krasis", "15", "0", "5"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["wrong"] == [], result.stderr
    assert report["reference"] == expected
    assert report["killed"] >= 15
    assert report["leftovers"] == []


def test_a_refusal_at_any_direct_write(run, inputs, expected, num_direct, fast_dir):
    for fail_at in (0, 1, num_direct // 2, num_direct - 1):
        out = fast_dir / f"{fail_at}.krasis"
        bundle = run(inputs, out, io=Disk(fail_at, errno.EINVAL), **SETTINGS)
        assert bundle.files() == expected
        assert "the file system takes no direct writes: Invalid argument" in bundle.summary.output_io


def test_a_refusal_is_an_error_for_who_insists(run, inputs, expected, num_direct, fast_dir):
    out = fast_dir / "m.krasis"
    with pytest.raises(ResourceError, match=r"no direct writes.*--output-io auto"):
        run(inputs, out, io=Disk(num_direct // 2, errno.EINVAL), output_io="direct", **SETTINGS)
    assert run(inputs, out, io=Disk(), **SETTINGS).files() == expected


def test_the_command_says_how_it_wrote(inputs, expected, digests_of, tmp_path):
    arguments = [*map(str, inputs), "-o", str(tmp_path / "m.krasis"), "--gpu-group", "64", "--json", "-q"]
    result = CliRunner().invoke(main, [*arguments, "--output-io", "buffered"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["output_io"] == "writes through the page cache (asked for)"
    assert digests_of(tmp_path / "m.krasis") == expected
    assert CliRunner().invoke(main, [*arguments, "--output-io", "fast"]).exit_code == 2
