"""Faulty disks are noticed before the bundle gets its name; full ones are met with a sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import convert_gguf
import gguf
import numpy as np
import pytest

from krasis.formats.errors import ChecksumError, FormatError, ResourceError
from krasis.formats.files.file_ops import FileOps


class FlipOnDisk(FileOps):
    """Writes one wrong bit at an offset of a shard."""

    def __init__(self, shard: str, offset: int) -> None:
        self._shard, self._offset = shard, offset

    def pwrite(self, fd, data, offset):
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name == self._shard and offset <= self._offset < offset + len(data):
            changed = bytearray(data)
            changed[self._offset - offset] ^= 0x40
            return super().pwrite(fd, bytes(changed), offset)
        return super().pwrite(fd, data, offset)


def test_a_wrong_bit_in_a_sampled_expert_is_found_without_asking(run, hf_dir, tmp_path):
    out = tmp_path / "out.krasis"
    # The first expert's first scale: 2 MiB of header, then 16 KiB of codes.
    io = FlipOnDisk("gpu-000.safetensors", (2 << 20) + 128 * 256 // 2 + 1)
    with pytest.raises(ChecksumError, match=r"experts\.gpu, expert 0: an expert read back differs"):
        run([hf_dir], out, io=io)
    assert not out.exists()


@pytest.mark.parametrize("shard", ["dense-000.safetensors", "cpu-000.safetensors"])
def test_any_wrong_bit_is_found_by_full_verification(run, hf_dir, bundle, tmp_path, shard):
    data = (bundle.path / shard).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    out = tmp_path / "out.krasis"
    with pytest.raises(ChecksumError, match="the bytes on disk are not those that were written"):
        run([hf_dir], out, io=FlipOnDisk(shard, start + 70_000), full_verify=True)
    assert not out.exists()


def test_full_verification_of_a_sound_disk(run, hf_dir, q8_gguf, bundle, tmp_path):
    assert run([hf_dir, q8_gguf], tmp_path / "out.krasis", full_verify=True).files() == bundle.files()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 9 MiB, where the test may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_full_disk(run, hf_dir, tiny_disk, monkeypatch):
    out = tiny_disk / "out.krasis"
    with pytest.raises(ResourceError, match="not enough disk space"):
        run([hf_dir], out)
    assert list(tiny_disk.iterdir()) == []
    # Somebody else fills the disk after the check.
    monkeypatch.setattr("krasis.convert.resources.free_disk_bytes", lambda _: 1 << 40)
    with pytest.raises(ResourceError, match=r"No space left on device.*free some disk space"):
        run([hf_dir], out)
    assert not out.exists()
    # With one tier less it fits, after discarding what the failure left.
    assert run([hf_dir], out, tiers=("cpu",)).path.exists()


def test_a_scale_that_is_not_finite_in_a_gguf_is_named(run, model, tmp_path, monkeypatch):
    add = convert_gguf.add_tensor

    def broken(writer, name, values, dtype, raw=None):
        if name == "blk.1.ffn_up_exps.weight":
            raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0).copy()
            raw[2, 17, 34:36] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
        add(writer, name, values, dtype, raw)

    monkeypatch.setattr(convert_gguf, "add_tensor", broken)
    path = model.write_gguf(tmp_path / "broken.gguf")
    for tiers in (("cpu",), ("gpu",)):
        with pytest.raises(FormatError, match=r"blk\.1\.ffn_up_exps\.weight.*NaN or infinity.*row 17\b"):
            run([path], tmp_path / "out.krasis", tiers=tiers, restart=True)
    assert not (tmp_path / "out.krasis").exists()
