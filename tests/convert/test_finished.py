"""A run killed behind the last rename is found complete by the next one; what is another bundle is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from krasis.convert.journal import JOURNAL_NAME
from krasis.convert.partial import partial_path
from krasis.formats.errors import ChecksumError, UsageError
from krasis.formats.files.file_ops import FileOps


class KilledError(BaseException):
    """As good as SIGKILL: nothing catches it."""


class Dies(FileOps):
    """After the rename that gives the bundle its name: at the sync, or before the leftovers go."""

    def __init__(self, at: str) -> None:
        self.at, self.renamed = at, False

    def rename_noreplace(self, source, target):
        super().rename_noreplace(source, target)
        self.renamed = True

    def rename_exchange(self, one, other):
        self.renamed = True
        return super().rename_exchange(one, other)

    def fsync(self, fd):
        if self.renamed and self.at == "sync":
            raise KilledError
        super().fsync(fd)

    def unlink(self, path):
        if self.renamed and self.at == Path(path).name:
            raise KilledError
        super().unlink(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "tiny.krasis"


@pytest.fixture
def kill(run, hf_dir, out):
    def killed(at: str, **settings) -> None:
        out.parent.mkdir(exist_ok=True)
        with pytest.raises(KilledError):
            run([hf_dir], out, io=Dies(at), **settings)
        assert (out / "manifest.json").exists()

    return killed


@pytest.fixture(scope="module")
def expected(run, hf_dir, tmp_path_factory):
    return run([hf_dir], tmp_path_factory.mktemp("expected") / "tiny.krasis")


@pytest.mark.parametrize("at", ["sync", JOURNAL_NAME])
@pytest.mark.parametrize("replace", [False, True])
def test_killed_behind_the_rename(run, hf_dir, out, kill, expected, at, replace):
    kill(at)
    assert (out / JOURNAL_NAME).exists()
    stamp = (out / "manifest.json").stat().st_mtime_ns
    again = run([hf_dir], out, replace=replace)
    assert again.summary.was_complete
    assert again.files() == expected.files()
    assert (out / "manifest.json").stat().st_mtime_ns == stamp  # not written again
    assert again.summary.quality == expected.summary.quality
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("at", ["sync", JOURNAL_NAME, "manifest.json"])
@pytest.mark.parametrize("replace", [False, True])
def test_killed_while_the_old_bundle_goes(run, hf_dir, q8_gguf, out, kill, expected, at, replace):
    out.parent.mkdir()
    run([hf_dir, q8_gguf], out)
    kill(at, replace=True)
    assert partial_path(out).exists()
    assert run([hf_dir], out, replace=replace).files() == expected.files()
    if at != "manifest.json" or replace:  # the old bundle is told from an unfinished one by the journal
        assert list(out.parent.iterdir()) == [out]


def test_without_a_journal_the_sources_are_compared(run, hf_dir, out, expected, model_class, shape_class):
    shutil.copytree(expected.path, out)
    again = run([hf_dir], out, verbosity=1)
    assert again.summary.was_complete
    assert "compared" in again.messages
    assert again.files() == expected.files()


def test_gguf_and_both_sources(run, hf_dir, q8_gguf, tmp_path):
    for paths in ([q8_gguf], [hf_dir, q8_gguf]):
        out = tmp_path / f"{len(paths)}.krasis"
        run(paths, out)
        assert run(paths, out).summary.was_complete


def test_another_model_of_the_same_shapes_does_not_pass(run, hf_dir, out, expected, tmp_path):
    """One bit of one weight."""
    other = Path(shutil.copytree(hf_dir, tmp_path / "other"))
    shutil.copytree(expected.path, out)
    shard = sorted(other.glob("*.safetensors"))[-1]
    status = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UsageError, match="exists already"):
        run([other], out)


@pytest.mark.parametrize("settings", [{"gpu_bits": 8}, {"cpu_format": "int4"}, {"shard_bytes": 3 << 20}])
def test_other_settings_do_not_pass(run, hf_dir, out, expected, kill, settings):
    kill("sync")
    with pytest.raises(UsageError, match="exists already"):
        run([hf_dir], out, **settings)
    (out / JOURNAL_NAME).unlink()
    with pytest.raises(UsageError, match="exists already"):
        run([hf_dir], out, **settings)


def test_another_text_file_does_not_pass(run, hf_dir, out, expected, tmp_path):
    other = Path(shutil.copytree(hf_dir, tmp_path / "other"))
    shutil.copytree(expected.path, out)
    (other / "generation_config.json").write_text('{"temperature": 0.123}')
    with pytest.raises(UsageError, match="exists already"):
        run([other], out)


@pytest.mark.parametrize("journal", [b"", b"garbage\n", b"\x00" * 5000, b"0123456789abcdef {}\n"])
def test_a_damaged_journal_beside_a_finished_bundle(run, hf_dir, out, expected, journal):
    shutil.copytree(expected.path, out)
    (out / JOURNAL_NAME).write_bytes(journal)
    assert run([hf_dir], out).summary.was_complete


def test_a_bundle_that_lacks_a_shard_does_not_pass(run, hf_dir, out, kill):
    kill("sync")
    (out / "cpu-000.safetensors").unlink()
    with pytest.raises(UsageError, match="exists already"):
        run([hf_dir], out)


def test_restart_does_not_take_it(run, hf_dir, out, expected):
    shutil.copytree(expected.path, out)
    with pytest.raises(UsageError, match="exists already"):
        run([hf_dir], out, restart=True)


def test_verify_reads_it(run, hf_dir, out, expected):
    shutil.copytree(expected.path, out)
    assert run([hf_dir], out, full_verify=True).summary.was_complete
    blob = json.loads((out / "manifest.json").read_bytes())["blobs"][0]
    with (out / blob["file"]).open("r+b") as file:
        file.seek(blob["offset_bytes"])
        byte = file.read(1)[0]
        file.seek(blob["offset_bytes"])
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ChecksumError):
        run([hf_dir], out, full_verify=True)


def test_a_link_to_a_finished_bundle_is_not_touched(run, hf_dir, out, expected):
    out.parent.mkdir()
    out.symlink_to(expected.path)
    with pytest.raises(UsageError, match="exists already"):
        run([hf_dir], out)
