"""What is checked before the work: memory, disk, the size of files; and what a plan says it reads."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from click.testing import CliRunner

from krasis.convert import conversion, resources
from krasis.convert.cli import main
from krasis.convert.resources import check_file_size
from krasis.formats.errors import ResourceError
from krasis.formats.files.file_ops import FileOps, io_errors
from krasis.formats.process.machine_limits import MemoryLimits

GIB = 1 << 30


def dry_run(*arguments: str | Path) -> tuple[int, dict[str, object], str]:
    given = [str(one) for one in (*arguments, "--dry-run", "--json", "--gpu-group", "64")]
    result = CliRunner().invoke(main, given)
    return result.exit_code, json.loads(result.stdout), result.stderr


def test_a_source_read_for_both_tiers_counts_once(hf_dir, q8_gguf, tmp_path):
    out = tmp_path / "m.krasis"
    both = dry_run(hf_dir, "-o", out)[1]
    one = dry_run(hf_dir, "-o", out, "--tiers", "gpu")[1]
    data = sum(file.stat().st_size for file in hf_dir.glob("*.safetensors"))
    assert both["source_bytes"] == one["source_bytes"]
    assert 0 < data - both["source_bytes"] < 0.02 * data  # headers
    # Two files are both read: experts of each, and the dense tensors of the checkpoint.
    assert dry_run(hf_dir, q8_gguf, "-o", out)[1]["source_bytes"] > one["source_bytes"]


def test_what_was_read_counts_once_too(run, hf_dir, tmp_path):
    summary = run([hf_dir], tmp_path / "m.krasis", gpu_group=64).summary
    assert summary.source_bytes == dry_run(hf_dir, "-o", tmp_path / "other.krasis")[1]["source_bytes"]


def test_a_tied_head_counts_once(model_class, shape_class, tmp_path):
    tied = model_class(shape_class(tied=True)).write_hf(tmp_path / "hf")
    data = sum(file.stat().st_size for file in tied.glob("*.safetensors"))
    assert dry_run(tied, "-o", tmp_path / "m.krasis")[1]["source_bytes"] < data


def test_a_dry_run_on_a_full_disk_fails_with_the_figures(hf_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "free_disk_bytes", lambda _: 1 << 20)
    monkeypatch.setattr(resources, "free_disk_bytes", lambda _: 1 << 20)
    code, plan, stderr = dry_run(hf_dir, "-o", tmp_path / "m.krasis")
    assert code == 6
    assert plan["free_disk_bytes"] == 1 << 20 < plan["needed_disk_bytes"]
    assert "not enough disk space for the bundle (got 1.05 MB free; limit " in stderr


def test_a_dry_run_with_too_little_memory_fails(hf_dir, tmp_path, monkeypatch):
    limits = MemoryLimits(64 * GIB, GIB, "the cgroup's limit", 100 << 20, "the control group's limit")
    monkeypatch.setattr(resources, "memory_limits", lambda: limits)
    monkeypatch.setattr(resources, "anonymous_bytes", lambda: 50 << 20)
    code, plan, stderr = dry_run(hf_dir, "-o", tmp_path / "m.krasis")
    assert code == 6
    assert plan["memory_bytes"] > 150 << 20
    assert (
        "not enough free memory to convert (got 157.3 MB available within the control group's limit" in stderr
    )
    monkeypatch.setattr(resources, "anonymous_bytes", lambda: 2 * GIB)  # what is needed is held already
    assert dry_run(hf_dir, "-o", tmp_path / "m.krasis")[0] == 0


def test_buffers_are_planned_within_the_memory_there_is(run, hf_dir, tmp_path, monkeypatch):
    roomy = dry_run(hf_dir, "-o", tmp_path / "m.krasis")[1]["memory_bytes"]
    limits = MemoryLimits(64 * GIB, GIB, "", roomy - (1 << 20), "the control group's limit")
    monkeypatch.setattr(resources, "memory_limits", lambda: limits)
    monkeypatch.setattr(resources, "anonymous_bytes", lambda: 0)
    code, plan, _ = dry_run(hf_dir, "-o", tmp_path / "m.krasis")
    assert code == 0
    assert plan["memory_bytes"] < roomy


# ---- the size of files -------------------------------------------------------------------------------------


@pytest.fixture
def ulimit_f(monkeypatch):
    """Sets what ``ulimit -f`` seems to be."""
    real = resource.getrlimit

    def make(num_bytes: int) -> None:
        limit = (num_bytes, resource.RLIM_INFINITY)
        monkeypatch.setattr(
            resources.resource,
            "getrlimit",
            lambda kind: limit if kind == resource.RLIMIT_FSIZE else real(kind),
        )

    return make


def test_a_limit_on_files_names_the_shard_size_that_fits(tmp_path, ulimit_f):
    ulimit_f(2 * GIB)
    check_file_size(tmp_path / "m", 2 * GIB, GIB)
    with pytest.raises(
        ResourceError, match=r"got 34\.4 GB; limit 2\.15 GB \(ulimit -f\).*--shard-size 2048MiB"
    ):
        check_file_size(tmp_path / "m", 32 * GIB, GIB)


def test_a_blob_that_does_not_fit_is_not_helped_by_smaller_shards(tmp_path, ulimit_f):
    ulimit_f(GIB)
    with pytest.raises(ResourceError, match="choose another disk or raise that limit") as caught:
        check_file_size(tmp_path / "m", 32 * GIB, 2 * GIB)
    assert "--shard-size" not in str(caught.value)


@pytest.mark.parametrize("kind", ["vfat", "msdos"])
def test_a_fat_disk_is_known_before_the_work(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(resources, "filesystem_kind", lambda _: kind)
    check_file_size(tmp_path / "m", 2**32 - 1, GIB)
    with pytest.raises(ResourceError, match=rf"limit 4\.29 GB \(the disk's file system, {kind}\).*4095MiB"):
        check_file_size(tmp_path / "m", 2**32, GIB)


def test_the_converter_refuses_before_it_writes(run, hf_dir, tmp_path, ulimit_f):
    ulimit_f(100_000)
    with pytest.raises(ResourceError, match="larger than files may be here"):
        run([hf_dir], tmp_path / "m.krasis", gpu_group=64)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_meets_the_limit_gives_the_hint(tmp_path):
    with (
        pytest.raises(ResourceError, match=r"reserving.*File too large.*--shard-size"),
        io_errors("reserving 5 bytes", tmp_path),
    ):
        raise OSError(27, "File too large")


def test_shards_of_the_named_size_are_written_under_the_limit(run, hf_dir, tmp_path, ulimit_f):
    ulimit_f(4 << 20)
    run([hf_dir], tmp_path / "m.krasis", gpu_group=64, shard_bytes=4 << 20, io=FileOps())
    assert max(file.stat().st_size for file in (tmp_path / "m.krasis").iterdir()) <= 4 << 20
