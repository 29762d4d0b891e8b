"""Shards written past the page cache: what may be mixed, what may be refused, and always the same bytes."""

from __future__ import annotations

import errno
import itertools
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.bundle.writer import BlobSpec, BundleWriter, FileOps, plan_shards
from krasis.formats.errors import ResourceError
from krasis.formats.files.aligned import aligned_empty, is_page_aligned
from krasis.formats.limits import HUGE_PAGE_BYTES, MIB, PAGE_BYTES

# Odd sizes, several blobs in a piece of 2 MiB, a blob within one piece, blobs over many.
SPECS = [
    BlobSpec("head", "dense", "U8", (3 * MIB + 12288 + 5,), "plain"),
    BlobSpec("small", "dense", "U8", (777,), "plain"),
    BlobSpec("large", "dense", "U8", (9 * MIB + 4096,), "plain"),
    BlobSpec("whole", "cpu", "U8", (3, 2 * MIB), "plain"),
    BlobSpec("odd", "cpu", "U8", (5 * MIB - 4096,), "plain"),
]


def data_of(spec: BlobSpec) -> np.ndarray:
    """Random, by the blob's name."""
    return np.random.default_rng(len(spec.name)).integers(0, 256, spec.num_bytes, dtype=np.uint8)


@dataclass
class StrictDisk(FileOps):
    """Takes direct writes as a disk of 4 KiB sectors would, whatever file system is below, and keeps a list.

    refuse_at: the direct write (from 0) that is refused with ``code``; -1: opening is, None: nothing is.
    """

    refuse_at: int | None = None
    code: int = errno.EINVAL
    direct: set[int] = field(default_factory=set)
    writes: list[tuple[int, bool, int, int]] = field(default_factory=list)

    def open(self, path, flags, mode=0o644):
        if flags & os.O_DIRECT and self.refuse_at == -1:
            raise OSError(self.code, os.strerror(self.code))
        fd = super().open(path, flags & ~os.O_DIRECT, mode)
        self.direct.discard(fd)
        if flags & os.O_DIRECT:
            self.direct.add(fd)
        return fd

    def pwrite(self, fd, data, offset):
        if fd in self.direct:
            number = sum(is_direct for _, is_direct, _, _ in self.writes)
            refused = self.refuse_at is not None and number >= self.refuse_at
            if (
                refused
                or offset % PAGE_BYTES
                or len(data) % PAGE_BYTES
                or not is_page_aligned(memoryview(data))
            ):
                raise OSError(self.code, os.strerror(self.code))
        count = self.write(fd, data, offset)
        self.writes.append((os.fstat(fd).st_ino, fd in self.direct, offset, count))
        return count

    def write(self, fd, data, offset):
        return super().pwrite(fd, data, offset)

    @property
    def direct_bytes(self) -> int:
        return sum(count for _, is_direct, _, count in self.writes if is_direct)


def write_shards(
    folder: Path, io: FileOps, *, piece: int = 5 * MIB + 3, shift: int = 0, output_io="auto"
) -> str:
    """Writes every blob in pieces from memory that begins ``shift`` bytes behind a page; the description."""
    with BundleWriter(folder, plan_shards(SPECS), io=io, output_io=output_io) as writer:
        writer.create()
        for spec in SPECS:
            memory = aligned_empty(spec.num_bytes + shift)[shift:]
            memory[:] = data_of(spec)
            with writer.open_blob(spec.name) as sink:
                for begin in range(0, len(memory), piece):
                    sink.write(memory[begin : begin + piece])
                sink.close()
            writer.sync_blob(spec.name)
        return writer.output_description


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """Built here from the plan, not by the writer."""
    files = {}
    for file in plan_shards(SPECS).files:
        raw = np.zeros(file.num_bytes, np.uint8)
        raw[: len(file.header)] = np.frombuffer(file.header, np.uint8)
        for blob in file.blobs:
            raw[blob.offset_bytes :][: blob.spec.num_bytes] = data_of(blob.spec)
        files[file.name] = raw.tobytes()
    return files


@pytest.mark.parametrize("shift", [0, 8, 512])
@pytest.mark.parametrize("piece", [100_003, 2 * MIB, 4 * MIB + 4096, 64 * MIB])
def test_direct_and_buffered_writes_never_meet_in_a_piece(tmp_path, expected, piece, shift):
    io = StrictDisk()
    assert write_shards(tmp_path / "x", io, piece=piece, shift=shift) == "direct writes"
    assert contents(tmp_path / "x") == expected
    pieces: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for inode, is_direct, offset, count in io.writes:
        if is_direct:
            assert offset % HUGE_PAGE_BYTES == count % HUGE_PAGE_BYTES == 0
        first, last = offset // HUGE_PAGE_BYTES, (offset + count - 1) // HUGE_PAGE_BYTES
        pieces[is_direct] |= {(inode, number) for number in range(first, last + 1)}
    assert not pieces[True] & pieces[False]
    whole = sum(
        max(
            0,
            (blob.offset_bytes + blob.spec.num_bytes) // HUGE_PAGE_BYTES
            - -(-blob.offset_bytes // HUGE_PAGE_BYTES),
        )
        for file in plan_shards(SPECS).files
        for blob in file.blobs
    )
    assert len(pieces[True]) == whole > 8


def test_no_piece_is_written_directly_twice(tmp_path):
    io = StrictDisk()
    write_shards(tmp_path / "x", io)
    starts = [(inode, offset) for inode, is_direct, offset, _ in io.writes if is_direct]
    assert len(starts) == len(set(starts))


@pytest.mark.parametrize("refuse_at", [-1, 0, 1, 3])
def test_a_refusal_at_any_time_leads_through_the_page_cache(tmp_path, expected, refuse_at, caplog):
    io = StrictDisk(refuse_at)
    with caplog.at_level(logging.INFO):
        description = write_shards(tmp_path / "x", io)
    assert contents(tmp_path / "x") == expected
    assert description.startswith("writes through the page cache (the file system takes no direct writes: ")
    assert os.strerror(errno.EINVAL) in description
    assert caplog.text.count("no direct writes") == 1
    assert (io.direct_bytes > 0) == (refuse_at > 0)


@pytest.mark.parametrize("refuse_at", [-1, 2])
def test_who_insists_on_direct_writes_is_told_why_not(tmp_path, refuse_at):
    with pytest.raises(ResourceError, match=r"takes no direct writes.*Invalid argument.*--output-io auto"):
        write_shards(tmp_path / "x", StrictDisk(refuse_at), output_io="direct")


@pytest.mark.parametrize("refuse_at", [-1, 0, 2])
def test_other_errors_are_errors(tmp_path, refuse_at):
    with pytest.raises(ResourceError, match="Input/output error"):
        write_shards(tmp_path / "x", StrictDisk(refuse_at, errno.EIO))


def test_buffered_is_buffered(tmp_path, expected):
    io = StrictDisk()
    assert (
        write_shards(tmp_path / "x", io, output_io="buffered") == "writes through the page cache (asked for)"
    )
    assert io.direct_bytes == 0
    assert not io.direct
    assert contents(tmp_path / "x") == expected


@pytest.mark.parametrize("step", [HUGE_PAGE_BYTES, 3 * PAGE_BYTES, PAGE_BYTES + 512, 512])
def test_direct_writes_cut_short_are_continued(tmp_path, expected, step):
    class Sluggish(StrictDisk):
        def write(self, fd, data, offset):
            return FileOps.pwrite(self, fd, data[:step] if len(data) > MIB else data, offset)

    io = Sluggish()
    write_shards(tmp_path / "x", io)
    assert contents(tmp_path / "x") == expected
    assert (io.direct_bytes > 0) == any(is_direct for _, is_direct, _, _ in io.writes)


def test_a_reopened_bundle_goes_on_directly(tmp_path, expected):
    """The first run wrote one blob half through the page cache; the second writes it whole and directly."""
    partial = tmp_path / "x"
    with BundleWriter(partial, plan_shards(SPECS), output_io="buffered") as writer:
        writer.create()
        with writer.open_blob("large") as sink:
            sink.write(bytes(7 * MIB + 1))
    with BundleWriter(partial, plan_shards(SPECS)) as writer:
        writer.reopen()
        for spec in SPECS:
            with writer.open_blob(spec.name) as sink:
                sink.write(data_of(spec))
                sink.close()
    assert contents(partial) == expected


def test_the_real_file_system(tmp_path, expected):
    description = write_shards(tmp_path / "x", FileOps())
    assert description == "direct writes" or "takes no direct writes" in description
    assert contents(tmp_path / "x") == expected


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 2 * MIB - 1, 2 * MIB, 5 * MIB + 1])
def test_aligned_memory(num_bytes):
    memory = aligned_empty(num_bytes)
    assert memory.shape == (num_bytes,)
    assert memory.dtype == np.uint8
    boundary = HUGE_PAGE_BYTES if num_bytes >= HUGE_PAGE_BYTES else PAGE_BYTES
    assert num_bytes == 0 or memory.ctypes.data % boundary == 0
    memory[:] = 7
    del memory


def test_many_short_writes_fill_pieces(tmp_path):
    """Bytes that come one at a time still leave in whole pieces."""
    io = StrictDisk()
    spec = BlobSpec("a", "cpu", "U8", (4 * MIB,), "plain")
    with BundleWriter(tmp_path / "x", plan_shards([spec]), io=io) as writer:
        writer.create()
        data = data_of(spec)
        with writer.open_blob("a") as sink:
            for begin, end in itertools.pairwise([0, 1, 2, 5000, 2 * MIB - 1, 2 * MIB, 3 * MIB, 4 * MIB]):
                sink.write(data[begin:end])
            sink.close()
    assert [(offset, count) for _, is_direct, offset, count in io.writes if is_direct] == [
        (2 * MIB, 2 * MIB),
        (4 * MIB, 2 * MIB),
    ]
