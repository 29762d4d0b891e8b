"""Names that an output may not have, and sources that change while they are converted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import krasis.convert.cli as cli
from krasis.convert import conversion
from krasis.convert.partial import partial_path
from krasis.formats.errors import MismatchError

MAIN = "from krasis.convert.cli import main; main()"


def invoke(*arguments):
    return CliRunner().invoke(cli.main, [str(one) for one in arguments], prog_name="krasis-convert")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("x.partial", "-o {}/x"),
        ("x.krasis.partial", "-o {}/x.krasis"),
        ("x.krasis.PARTIAL", "-o {}/x.krasis"),
        ("x.partial/", "-o {}/x"),
        ("x.replaced", "-o {}/x"),
        (".partial", "choose another name"),
    ],
)
def test_names_that_no_reader_opens(hf_dir, tmp_path, name, hint, dry_run):
    result = invoke(hf_dir, "-o", f"{tmp_path}/{name}", *(["--dry-run"] if dry_run else []))
    assert result.exit_code == 2, result.output
    assert hint.format(tmp_path) in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_bytes", [247, 255, 256, 5000])
@pytest.mark.parametrize("letter", ["x", "ü"])
def test_names_that_are_too_long(hf_dir, tmp_path, num_bytes, letter):
    name = letter * (num_bytes // len(letter.encode()) + 1)
    result = invoke(hf_dir, "-o", tmp_path / name)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert "name is too long" in result.stderr
    assert not list(tmp_path.iterdir())


def test_not_inside_another_bundle(hf_dir, bundle, tmp_path):
    before = sorted(bundle.path.iterdir())
    unfinished = tmp_path / "x.krasis.partial"
    unfinished.mkdir()
    for folder in (bundle.path, unfinished):
        result = invoke(hf_dir, "-o", folder / "y.krasis")
        assert result.exit_code == 2
        assert "inside another bundle" in result.stderr
    assert sorted(bundle.path.iterdir()) == before


def test_the_longest_name_works_and_is_replaced(hf_dir, tmp_path):
    out = tmp_path / ("x" * 246)
    assert invoke(hf_dir, "-o", out, "-q").exit_code == 0
    assert invoke(hf_dir, "-o", out, "-q", "--force", "--gpu-bits", "8").exit_code == 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_name_that_is_no_text_works(hf_dir, tmp_path):
    out = os.fsencode(tmp_path) + b"/\xff\xfe.krasis"
    command = [sys.executable, "-c", MAIN, str(hf_dir), "-o", out, "--json"]
    for _ in range(2):  # the second finds it complete
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == 0, done
        assert b"Traceback" not in done.stderr
    assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [b"\xff\xfe.krasis"]


@pytest.mark.parametrize("kind", ["file", "fifo", "link", "dangling"])
def test_what_is_no_folder_is_not_touched(hf_dir, tmp_path, kind):
    out = tmp_path / "x.krasis"
    if kind == "file":
        out.write_text("years of work")
    elif kind == "fifo":
        os.mkfifo(out)
    else:
        out.symlink_to(hf_dir if kind == "link" else "/nowhere/at/all")
    before = out.lstat()
    for option in ([], ["--force"], ["--restart"]):
        result = invoke(hf_dir, "-o", out, *option)
        assert result.exit_code == 2, result.output
        assert len(result.stderr.splitlines()) == 1
    assert out.lstat() == before


def test_the_unfinished_bundle_would_be_the_input(hf_dir, tmp_path):
    source = Path(shutil.copytree(hf_dir, tmp_path / "model.partial"))
    result = invoke(source, "-o", tmp_path / "model")
    assert result.exit_code == 2
    assert "inside an input" in result.stderr


@pytest.mark.parametrize("change", ["append", "touch", "remove", "replace"])
def test_a_source_that_changes_meanwhile(run, hf_dir, tmp_path, monkeypatch, change):
    """What was read before and what was read after may not be of one model."""
    source = Path(shutil.copytree(hf_dir, tmp_path / "hf"))
    shard = sorted(source.glob("*.safetensors"))[0]
    real = conversion.run_units

    def run_then_change(*arguments):
        result = real(*arguments)
        if change == "append":
            with shard.open("ab") as file:
                file.write(b"x")
        elif change == "touch":
            os.utime(shard, (1, 1))
        elif change == "remove":
            shard.unlink()
        else:
            shutil.copy(shard, tmp_path / "new")
            (tmp_path / "new").replace(shard)
        return result

    monkeypatch.setattr(conversion, "run_units", run_then_change)
    out = tmp_path / "out.krasis"
    with pytest.raises(MismatchError, match="changed while it was being converted") as caught:
        run([source], out)
    assert str(shard) in str(caught.value)
    assert not out.exists()
    assert partial_path(out).exists()
