"""A converted bundle as others see it: reference safetensors library, alignment, the kernel's page tables."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import ResourceError, UsageError
from krasis.runtime.host.filesystem import IN_RAM, filesystem_of_path
from krasis.runtime.host_memory.page_cache import cached_share

HUGE_PAGE_BYTES = 2 << 20
ROOT = Path(__file__).parents[2]
# Blobs of 3.5 MB and more: smaller ones are no huge page.
SHAPE = "--shape custom --layers 2 --hidden 256 --heads 4 --kv-heads 2 --head-dim 64 --experts 16 --top-k 2 "
SHAPE += "--expert-intermediate 512 --vocab 512"


# The kernel may drop a file's clean pages at any time, with memory to spare too, and what is then read
# without our advice comes back in small ones: seen with one bundle in sixty, whose small pages had been read
# from the disk, not written.
ATTEMPTS = 5


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    model = tmp_path_factory.mktemp("model") / "model"
    command = [sys.executable, "-m", "scripts.models.make_random_model", *SHAPE.split(), "--out", model]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return model


@pytest.fixture(scope="module")
def bundle_path(model_path, tmp_path_factory) -> Path:
    return converted(model_path, tmp_path_factory.mktemp("bundle") / "model.krasis")


def converted(model: Path, out: Path) -> Path:
    """Written through the page cache, whose pages the writer chooses. A shard written past it gets them when
    it is first read: huge ones but at its very beginning, where reading the header has brought in small
    ones. Shards as small as these are little else; scripts/bench_convert.py looks at real ones.
    """
    reporter = Reporter(0)
    convert(prepare([model], out, ConvertSettings(output_io="buffered"), reporter), reporter)
    return out


def huge_mapped_bytes(path: Path) -> int:
    """FilePmdMapped of every mapping of a file in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("FilePmdMapped:"):
            total += int(line.split()[1]) * 1024
    return total


def kernel_maps_files_by_huge_pages(folder: Path) -> bool:
    """Tried with a plain file of this file system, written in whole huge pages, and Python's own mapping."""
    path = folder / "control.bin"
    num_pages = 8
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        for page in range(num_pages):
            os.pwrite(fd, bytes([1]) * HUGE_PAGE_BYTES, page * HUGE_PAGE_BYTES)
        with mmap.mmap(fd, num_pages * HUGE_PAGE_BYTES, prot=mmap.PROT_READ) as mapped:
            mapped.madvise(mmap.MADV_HUGEPAGE)
            touched = sum(mapped[::HUGE_PAGE_BYTES])
            # Where the mapping does not begin at a huge page, one is cut in two.
            return touched == num_pages and huge_mapped_bytes(path) >= (num_pages - 1) * HUGE_PAGE_BYTES
    finally:
        os.close(fd)
        path.unlink()


def test_the_reference_library_reads_every_tensor(bundle_path):
    with Bundle.open(bundle_path) as bundle:
        for file in bundle.manifest.files:
            with safe_open(bundle_path / file.name, framework="numpy") as reference:
                names = {name for name in reference.keys() if not name.startswith("_padding.")}  # noqa: SIM118
                ours = {blob.name for blob in bundle.manifest.blobs if blob.file == file.name}
                assert names == ours
                for name in names:
                    if bundle.blob(name).dtype == "BF16":  # no NumPy type
                        continue
                    np.testing.assert_array_equal(reference.get_tensor(name), bundle.map(name))


def test_expert_blobs_lie_at_huge_page_boundaries_in_file_and_memory(bundle_path):
    with Bundle.open(bundle_path) as bundle:
        experts = [blob for blob in bundle.manifest.blobs if blob.tier in ("gpu", "cpu")]
        assert len(experts) == 2 * bundle.architecture.num_layers
        for blob in experts:
            assert blob.offset_bytes % HUGE_PAGE_BYTES == 0
            assert bundle.map(blob.name).ctypes.data % HUGE_PAGE_BYTES == 0


def lacking_huge_pages(bundle_path: Path) -> list[str]:
    """The shards whose experts, once read, are not mapped by huge pages wherever they fill one."""
    lacking = []
    with Bundle.open(bundle_path) as bundle:
        for tier in ("gpu", "cpu"):
            blobs = [blob for blob in bundle.manifest.blobs if blob.tier == tier]
            assert sum(int(bundle.map(blob.name).sum(dtype=np.int64)) for blob in blobs) > 0
            pages = {
                page
                for blob in blobs
                for page in range(
                    blob.offset_bytes // HUGE_PAGE_BYTES,
                    (blob.offset_bytes + blob.num_bytes) // HUGE_PAGE_BYTES,
                )
            }
            assert len(pages) >= len(blobs)
            path = bundle_path / blobs[0].file
            huge = huge_mapped_bytes(path)
            if huge < len(pages) * HUGE_PAGE_BYTES:
                lacking.append(f"{path}: {huge // HUGE_PAGE_BYTES} huge pages of {len(pages)}")
    return lacking


def test_expert_blobs_are_mapped_by_huge_pages(model_path, tmp_path):
    lacking, kernel_does = [], False
    for attempt in range(ATTEMPTS):
        found = lacking_huge_pages(converted(model_path, tmp_path / f"{attempt}.krasis"))
        if not found:
            return
        lacking += found
        kernel_does |= kernel_maps_files_by_huge_pages(tmp_path)
    if not kernel_does:
        pytest.skip("this kernel or file system backs no file mapping by huge pages")
    pytest.fail("\n".join(lacking))


def test_dropped_files_leave_the_page_cache(bundle_path: Path, tmp_path: Path) -> None:
    if filesystem_of_path(tmp_path) in IN_RAM:
        pytest.skip("the temporary folder lies in RAM")
    shutil.copytree(bundle_path, tmp_path / "copy.krasis")
    with Bundle.open(tmp_path / "copy.krasis") as bundle:
        dropped = [file.name for file in bundle.manifest.files]
        bundle.drop_cached(dropped)
        for name in dropped:
            assert cached_share(*bundle.mapping_of(name)) == 0.0
        blob = next(blob for blob in bundle.manifest.blobs if blob.file == dropped[0])
        with Bundle.open(bundle_path) as original:
            np.testing.assert_array_equal(bundle.map(blob.name), original.map(blob.name))
    with pytest.raises(UsageError, match="closed"):
        bundle.drop_cached(dropped)


def test_dropping_what_cannot_be_written_is_an_error(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with (
        Bundle.open(bundle_path) as bundle,
        pytest.raises(ResourceError, match="writing a shard to disk failed: Input/output error"),
    ):
        bundle.drop_cached([bundle.manifest.files[0].name])
