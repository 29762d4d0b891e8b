"""The same inputs give the same bytes: twice, on any number of threads, and after a resume from anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from krasis.convert.journal import JOURNAL_NAME
from krasis.formats.files.file_ops import FileOps

SMALL_SHARDS = 3 << 20  # several files a tier


class StopBeforeRenameError(Exception):
    """Stands for the moment before the bundle gets its name."""


class KeepPartial(FileOps):
    """Never lets the finished directory get its name."""

    def rename_noreplace(self, source, target):
        raise StopBeforeRenameError

    def rename_exchange(self, one, other):
        raise StopBeforeRenameError


@pytest.fixture(scope="module")
def reference(run, hf_dir, q8_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "tiny.krasis"
    return run([hf_dir, q8_gguf], out, shard_bytes=SMALL_SHARDS, num_threads=1)


def test_twice_in_any_order_and_on_two_threads(run, reference, hf_dir, q8_gguf, tmp_path):
    again = run([q8_gguf, hf_dir], tmp_path / "again.krasis", shard_bytes=SMALL_SHARDS, num_threads=2)
    assert again.files() == reference.files()
    assert len(list(reference.path.glob("gpu-*.safetensors"))) == 2


def test_a_resume_from_every_point_of_the_journal_gives_the_same_bytes(
    run, reference, hf_dir, q8_gguf, fast_dir
):
    out = fast_dir / "tiny.krasis"
    partial = Path(f"{out}.partial")
    with pytest.raises(StopBeforeRenameError):
        run([hf_dir, q8_gguf], out, io=KeepPartial(), shard_bytes=SMALL_SHARDS)
    journal = (partial / JOURNAL_NAME).read_bytes()
    lines = journal.splitlines(keepends=True)
    assert len(lines) == 1 + 1 + 2 * 3  # header, the model's own tensors, dense, gpu and cpu of two layers
    manifest = "manifest.json"
    for count in range(len(lines) + 1):
        with pytest.raises(StopBeforeRenameError):
            run([hf_dir, q8_gguf], out, io=KeepPartial(), shard_bytes=SMALL_SHARDS, restart=count == 0)
        # What is not journalled must be written again, so it is destroyed here.
        kept = b"".join(lines[:count])
        torn = lines[count][: len(lines[count]) // 2] if count < len(lines) else b""
        (partial / JOURNAL_NAME).write_bytes(kept + torn)
        (partial / manifest).unlink()
        done = {name for line in lines[1:count] for name in json.loads(line.split(b" ", 1)[1])["blobs"]}
        for shard in partial.glob("*.safetensors"):
            destroy_blobs(shard, done)
        bundle = run([hf_dir, q8_gguf], out, shard_bytes=SMALL_SHARDS)
        assert bundle.files() == reference.files(), f"after {count} lines"
        assert bundle.summary.resumed_units == max(count - 1, 0)
        assert not partial.exists()
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


def destroy_blobs(shard: Path, done: set[str]) -> None:
    """Overwrites all blobs but those in ``done``."""
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name not in done and not name.startswith("_"):
            begin, end = (start + offset for offset in entry["data_offsets"])
            data[begin:end] = b"\xaa" * (end - begin)
    shard.write_bytes(data)


def test_the_quality_report_has_an_array_per_kind_and_the_same_bytes(bundle, run, hf_dir, q8_gguf, tmp_path):
    import io

    import h5py
    import zstandard

    packed = (bundle.path / "quality.h5.zst").read_bytes()
    data = zstandard.ZstdDecompressor().decompress(packed)
    with h5py.File(io.BytesIO(data), "r") as file:
        assert file["experts.gpu.w13/expert_relative_mse"].shape == (2, 4)
        assert file["attention.qkv/layer_relative_mse"].shape == (2,)
        assert 0.004 < file["experts.gpu.w2"].attrs["relative_mse"] < 0.012
    again = run([hf_dir, q8_gguf], tmp_path / "again.krasis")
    assert (again.path / "quality.h5.zst").read_bytes() == packed
