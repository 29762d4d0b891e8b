"""Small pages of mapped weights: counted, moved into huge ones, or dropped and read anew."""

from __future__ import annotations

import errno
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.files.file_mapping import FileMapping, prefault
from krasis.formats.limits import HUGE_PAGE_BYTES, MIB
from krasis.runtime.cli.report import memory_note
from krasis.runtime.host import prefault as module
from krasis.runtime.host.filesystem import filesystem_of_path
from krasis.runtime.host.huge_pages import collapse, collapse_all, huge_and_mapped_bytes, huge_share
from krasis.runtime.host.prefault import Prefault
from tests.support.patience import PATIENCE_S

NUM_BYTES = 8 * HUGE_PAGE_BYTES + 12345
CONTENT = np.random.default_rng(0).integers(0, 256, NUM_BYTES, np.uint8)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- a file in RAM is what is wanted


def mapping_of(path: Path) -> FileMapping:
    fd = os.open(path, os.O_RDONLY)
    try:
        mapping = FileMapping(fd, path.stat().st_size)
    finally:
        os.close(fd)
    prefault(mapping.address, mapping.num_bytes)
    return mapping


@pytest.fixture
def small_pages() -> Iterator[FileMapping]:
    """A file in RAM whose pages are small and could be huge."""
    if not SHARED_MEMORY.is_dir() or filesystem_of_path(SHARED_MEMORY) != "tmpfs":
        pytest.skip(f"{SHARED_MEMORY} is no tmpfs")
    with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY) as file:
        file.write(CONTENT.tobytes())
        file.flush()
        mapping = mapping_of(Path(file.name))
        if huge_share([(mapping.address, NUM_BYTES)]) != 0.0:
            pytest.skip("this tmpfs has huge pages anyway")
        if collapse(mapping.address, HUGE_PAGE_BYTES) == errno.EINVAL:
            pytest.skip("this kernel is older than MADV_COLLAPSE")
        yield mapping_of(Path(file.name))


def test_moved_into_huge_pages(small_pages: FileMapping) -> None:
    whole = (small_pages.address, NUM_BYTES)
    assert collapse(*whole) == 0
    huge, mapped = huge_and_mapped_bytes([whole])
    assert huge == 8 * HUGE_PAGE_BYTES
    assert mapped == 8 * HUGE_PAGE_BYTES + 4 * 4096  # what fills no huge page is left as it is
    np.testing.assert_array_equal(small_pages.view(), CONTENT)


def test_only_whole_pieces_of_a_range_are_moved(small_pages: FileMapping) -> None:
    begin = small_pages.address + 3 * HUGE_PAGE_BYTES + 1
    assert collapse(begin, 3 * HUGE_PAGE_BYTES - 2) == 0
    # The fixture has moved the first piece; this mapping's page tables may know it or not.
    huge, _ = huge_and_mapped_bytes([(small_pages.address, NUM_BYTES)])
    assert huge in (2 * HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES)
    assert collapse(begin, 100) == 0


def test_several_threads_move_everything_or_stop(
    small_pages: FileMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krasis.runtime.host.huge_pages.PIECE_BYTES", HUGE_PAGE_BYTES)
    whole = [(small_pages.address, NUM_BYTES)]
    stopping = threading.Event()
    stopping.set()
    before = huge_and_mapped_bytes(whole)
    collapse_all(whole, 3, stopping)
    assert huge_and_mapped_bytes(whole) == before
    stopping.clear()
    collapse_all(whole, 3, stopping)
    assert huge_and_mapped_bytes(whole)[0] == 8 * HUGE_PAGE_BYTES


class BundleOf(SimpleNamespace):
    """What Prefault asks a bundle, with one file."""

    def mapping_of(self, _: str) -> tuple[int, int]:
        return self.mapping.address, self.mapping.num_bytes


def test_reading_ahead_ends_in_huge_pages(
    small_pages: FileMapping, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = BundleOf(mapping=small_pages)
    few = Prefault(bundle, ["cpu-000.safetensors"])  # type: ignore[arg-type]
    few.wait()
    assert few.huge_share is None  # too few bytes to matter
    monkeypatch.setattr(module, "MATTERING_BYTES", MIB)
    with caplog.at_level(logging.INFO):
        reading = Prefault(bundle, ["cpu-000.safetensors"])  # type: ignore[arg-type]
        reading.wait()
    assert reading.huge_share is not None
    assert reading.huge_share > 0.99
    assert "prefault: 100 % of the weights lie in huge pages" in caplog.text


def test_what_is_needed_first_is_read_first(small_pages: FileMapping) -> None:
    asked, early = threading.Semaphore(0), threading.Event()

    def is_early() -> bool:
        asked.release()
        return not early.is_set()

    reading = Prefault(BundleOf(mapping=small_pages), ["a"], is_early=is_early)  # type: ignore[arg-type]
    for _ in range(3 * module.NUM_THREADS):
        assert asked.acquire(timeout=PATIENCE_S)
    assert reading.progress() is None
    assert reading._num_bytes == 0
    early.set()
    reading.wait()
    assert reading._num_bytes == small_pages.num_bytes
    assert reading.progress() is None
    # One that is stopped does not wait for what never ends.
    stopped = Prefault(BundleOf(mapping=small_pages), ["a"], is_early=lambda: True)  # type: ignore[arg-type]
    stopped.stop()
    assert stopped._num_bytes == 0


def test_a_kernel_that_declines_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files of a disk are moved by some kernels only; memory of no file and no huge page by none."""
    path = tmp_path / "weights"
    path.write_bytes(CONTENT.tobytes())
    mapping = mapping_of(path)
    with caplog.at_level(logging.INFO):
        collapse_all([(mapping.address, NUM_BYTES)], 2, threading.Event())
    share = huge_share([(mapping.address, NUM_BYTES)])
    assert share is not None
    assert share > 0.9 or "declined" in caplog.text
    np.testing.assert_array_equal(mapping.view(), CONTENT)
    # Nothing is mapped there. EINVAL: a kernel older than MADV_COLLAPSE.
    assert collapse(1 << 46, HUGE_PAGE_BYTES) in (errno.ENOMEM, errno.EINVAL)


def test_impossible_arguments() -> None:
    for address, num_bytes in ((0, 1), (4096, 0), (4096, -1)):
        with pytest.raises(NativeError, match="krasis_collapse"):
            collapse(address, num_bytes)


def test_nothing_mapped_has_no_share() -> None:
    assert huge_share([]) is None
    assert huge_share([(1 << 46, 4096)]) is None


@pytest.mark.parametrize(
    ("share", "reread", "said"),
    [
        (None, False, ""),
        (0.99, False, ""),
        (0.04, False, "4% of the weights lie in huge pages.*--reread"),
        (0.04, True, "4% of the weights lie in huge pages.*XFS"),
    ],
)
def test_small_pages_are_told(share: float | None, reread: bool, said: str) -> None:
    note = memory_note(SimpleNamespace(huge_page_share=share, settings=SimpleNamespace(reread=reread)))  # type: ignore[arg-type]
    if said:
        assert re.search(said, note)
        assert ("--reread" in note) != reread
    else:
        assert note == ""
