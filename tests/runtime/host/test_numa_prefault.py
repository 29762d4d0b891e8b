"""Weights read by the node that computes with them: nodes, who owns which bytes, the threads that read."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from krasis.formats.bundle.manifest_records import BlobRecord
from krasis.formats.errors import ResourceError
from krasis.formats.files import file_mapping
from krasis.formats.files.file_mapping import FileMapping
from krasis.formats.layouts import CpuTileLayout
from krasis.formats.limits import HUGE_PAGE_BYTES, MIB
from krasis.runtime.host import prefault as module
from krasis.runtime.host.numa import (
    NumaNode,
    OwnedRange,
    first_unit,
    nodes_of_pages,
    numa_nodes,
    owned_ranges,
    piece_owners,
    read_exactly,
)
from krasis.runtime.host.prefault import Prefault

CPUS = sorted(os.sched_getaffinity(0))
HIDDEN, INTERMEDIATE, EXPERTS = 2048, 704, 3  # 22 units of w13: not a multiple of 3 or 4 nodes
# The first layer is dense: no flat record describes such a model.
SHAPES: Any = SimpleNamespace(
    hidden=HIDDEN,
    layers=(
        SimpleNamespace(experts=None),
        SimpleNamespace(
            experts=SimpleNamespace(intermediate=INTERMEDIATE, gated=True, width=lambda hidden: hidden)
        ),
    ),
)
RECORD = CpuTileLayout("q8").expert_record(HIDDEN, INTERMEDIATE)
START = 2 * HUGE_PAGE_BYTES  # of the experts in their file
FILE_BYTES = START + EXPERTS * RECORD.record_bytes + 12345


def made_up_nodes(num_nodes: int) -> tuple[NumaNode, ...]:
    return tuple(NumaNode(10 + i, (CPUS[i % len(CPUS)],)) for i in range(num_nodes))


def blob(shape: tuple[int, ...], layout: str, num_bytes: int, offset: int = START) -> BlobRecord:
    return BlobRecord("name", "cpu", "cpu-000.safetensors", offset, num_bytes, "U8", shape, layout, "")


def expert_blob() -> BlobRecord:
    return blob((EXPERTS, RECORD.record_bytes), "cpu-q8-r32-b32", EXPERTS * RECORD.record_bytes)


@dataclass
class FakeBundle:
    """What Prefault asks a bundle, without a file behind it: nothing is read in these tests."""

    blobs: tuple[BlobRecord, ...]
    address: int = 1 << 40

    @property
    def manifest(self) -> SimpleNamespace:
        return SimpleNamespace(blobs=self.blobs)

    @property
    def spec(self) -> Any:
        return SHAPES

    def mapping_of(self, file: str) -> tuple[int, int]:
        return self.address + (1 << 32) * (file != "cpu-000.safetensors"), FILE_BYTES


def test_nodes_are_of_this_machine() -> None:
    nodes = numa_nodes()
    assert sorted(cpu for node in nodes for cpu in node.cpus) == CPUS
    assert len({node.number for node in nodes}) == len(nodes)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 8])
def test_units_are_shared_out_evenly(num_nodes: int) -> None:
    for units in (0, 1, 5, 24, 48, 128):
        bounds = [first_unit(units, num_nodes, i) for i in range(num_nodes + 1)]
        widths = [end - begin for begin, end in pairwise(bounds)]
        assert bounds[0] == 0
        assert bounds[-1] == units
        assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("num_nodes", [2, 3, 4])
def test_rows_of_an_expert_and_their_nodes(num_nodes: int) -> None:
    ranges = list(owned_ranges(expert_blob(), SHAPES, num_nodes))
    at = START
    for item in ranges:  # no byte twice, none of the tiles left out
        assert item.offset_bytes >= at
        at = item.offset_bytes + item.num_bytes
    tiles = RECORD.w13_codes.num_bytes + RECORD.w2_codes.num_bytes
    assert sum(item.num_bytes for item in ranges) == EXPERTS * tiles
    # Node by node as the kernels count: block b of gate and up is strips 2b and 2b + 1 of w13, row after row.
    block_bytes, strip_bytes = 2 * (HIDDEN // 32) * 1088, (INTERMEDIATE // 32) * 1088

    def node_at(offset: int) -> int:
        (found,) = (r.node for r in ranges if r.offset_bytes <= offset < r.offset_bytes + r.num_bytes)
        return found

    for expert in range(EXPERTS):
        w13 = START + expert * RECORD.record_bytes
        w2 = w13 + RECORD.w2_codes.offset_bytes
        for node in range(num_nodes):
            for block in range(*(first_unit(INTERMEDIATE // 32, num_nodes, node + i) for i in (0, 1))):
                assert node_at(w13 + block * block_bytes) == node
                assert node_at(w13 + (block + 1) * block_bytes - 1) == node
            for strip in range(*(first_unit(HIDDEN // 32, num_nodes, node + i) for i in (0, 1))):
                assert node_at(w2 + strip * strip_bytes) == num_nodes - 1 - node


def test_rows_of_a_dense_weight() -> None:
    weight = blob((5, 16, 32, 4), "int8-rows-r32k4", 5 * 2048, 4096)
    assert list(owned_ranges(weight, SHAPES, 2)) == [
        OwnedRange(4096, 3 * 2048, 0),
        OwnedRange(4096 + 6144, 4096, 1),
    ]
    # More nodes than strips; scales, plain tensors and experts for the GPU are of no node.
    assert {item.node for item in owned_ranges(weight, SHAPES, 8)} == {0, 1, 3, 4, 6}
    for other in (
        blob((160,), "int8-rows-r32k4", 640),
        blob((9, 9), "plain", 81),
        blob((1, 2), "marlin-u4b8-g128-bf16", 2),
    ):
        assert list(owned_ranges(other, SHAPES, 2)) == []


def test_a_piece_goes_to_the_owner_of_most_of_it() -> None:
    ranges = [OwnedRange(150, 40, 1), OwnedRange(190, 30, 0), OwnedRange(220, 130, 1)]
    assert piece_owners(ranges, 650, 100, 2) == [0, 1, 1, 1, 0, 1, 0]
    assert piece_owners([], 5, 2, 3) == [0, 1, 2]
    assert piece_owners([], 0, 2, 3) == []


def run(
    monkeypatch: pytest.MonkeyPatch,
    nodes: tuple[NumaNode, ...],
    read: Callable[[int, int], None],
    num_threads: int = 2,
) -> Prefault:
    calls: list[bool] = []
    monkeypatch.setattr(module, "prefault", read)
    monkeypatch.setattr(module, "read_exactly", lambda *_, exactly: calls.append(exactly))
    monkeypatch.setattr(module, "nodes_of_pages", lambda addresses: [11 for _ in addresses])
    files = ["cpu-000.safetensors", "other"]
    prefault = Prefault(FakeBundle((expert_blob(),)), files, num_threads, nodes)  # type: ignore[arg-type]
    prefault.wait()
    assert calls == ([True, True, False, False] if len(nodes) > 1 else [])
    return prefault


@pytest.mark.parametrize("num_nodes", [0, 1, 2, 3, 4])
def test_every_byte_is_read_once_by_its_node(monkeypatch: pytest.MonkeyPatch, num_nodes: int) -> None:
    nodes = made_up_nodes(num_nodes)
    reads: list[tuple[int, int, int, frozenset[int]]] = []
    lock = threading.Lock()

    def read(address: int, num_bytes: int) -> None:
        with lock:
            reads.append((address, num_bytes, threading.get_ident(), frozenset(os.sched_getaffinity(0))))

    run(monkeypatch, nodes, read)
    first = FakeBundle(()).mapping_of("cpu-000.safetensors")[0]
    for file in ("cpu-000.safetensors", "other"):
        base, at = FakeBundle(()).mapping_of(file)[0], 0
        for address, num_bytes, *_ in sorted(r for r in reads if base <= r[0] < base + FILE_BYTES):
            assert address == base + at
            at += num_bytes
        assert at == FILE_BYTES
    assert set(CPUS) == os.sched_getaffinity(0)
    if num_nodes < 2:
        assert {cpus for *_, cpus in reads} == {frozenset(CPUS)}
        assert max(num_bytes for _, num_bytes, *_ in reads) > 2 * MIB
        return
    owners = piece_owners(
        owned_ranges(expert_blob(), SHAPES, num_nodes), FILE_BYTES, HUGE_PAGE_BYTES, num_nodes
    )
    for address, _, _, cpus in reads:
        if address < first + FILE_BYTES:
            assert cpus == set(nodes[owners[(address - first) // HUGE_PAGE_BYTES]].cpus)


def test_a_node_reads_in_the_order_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: dict[str, list[int]] = {}

    def read(address: int, _: int) -> None:
        reads.setdefault(threading.current_thread().name, []).append(address)

    run(monkeypatch, made_up_nodes(3), read, num_threads=1)
    assert len(reads) == 3
    assert all(len(own) > 2 and own == sorted(own) for own in reads.values())


def test_where_the_pages_lie_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(monkeypatch, made_up_nodes(2), lambda *_: None)
    owned_by_second = sum(
        sum(owner == 1 for owner in owners)
        for owners in (
            piece_owners(owned_ranges(expert_blob(), SHAPES, 2), FILE_BYTES, HUGE_PAGE_BYTES, 2),
            piece_owners([], FILE_BYTES, HUGE_PAGE_BYTES, 2),
        )
    )
    total = 2 * -(-FILE_BYTES // HUGE_PAGE_BYTES)
    assert f"2 NUMA nodes; {owned_by_second} of {total} pages looked at" in caplog.text


def test_refusals_are_logged_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no")

    num_bytes: list[int] = []
    monkeypatch.setattr(module.os, "sched_setaffinity", refuse)
    run(monkeypatch, made_up_nodes(2), lambda _, size: num_bytes.append(size))
    assert sum(num_bytes) == 2 * FILE_BYTES
    assert "cannot be bound to NUMA node 11" in caplog.text


def test_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ResourceError("gone")

    assert run(monkeypatch, made_up_nodes(3), fail)._num_bytes == 0


def resident_pages(address: int, num_bytes: int) -> int:
    libc = ctypes.CDLL(None)
    pages = ctypes.create_string_buffer(num_bytes // mmap.PAGESIZE)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), pages) == 0
    return sum(byte & 1 for byte in pages.raw)


def test_a_huge_page_is_read_without_the_next(tmp_path: Path) -> None:
    """Else every second huge page would come to lie on the node of the one before it."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(8 * MIB))
    brought = {}
    for exactly in (False, True):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        mapping = FileMapping(fd, 8 * MIB)
        os.close(fd)
        if resident_pages(mapping.address, 8 * MIB):
            pytest.skip("this file system keeps the file in memory")
        read_exactly(mapping.address, 8 * MIB, exactly=exactly)
        file_mapping.prefault(mapping.address + 2 * MIB, 2 * MIB)
        brought[exactly] = resident_pages(mapping.address, 8 * MIB) * mmap.PAGESIZE
        del mapping
    if brought[False] == 2 * MIB:
        pytest.skip("this kernel does not read ahead here")
    assert brought[True] == 2 * MIB


def test_real_files_are_read_and_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both advices and the question about pages, on a mapping of this machine."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(5 * MIB))
    fd = os.open(path, os.O_RDONLY)
    mapping = FileMapping(fd, 5 * MIB)
    os.close(fd)
    bundle = FakeBundle(())
    bundle.mapping_of = lambda _: (mapping.address, 5 * MIB)  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO):
        Prefault(bundle, ["a"], nodes=made_up_nodes(2)).wait()  # type: ignore[arg-type]
    assert "0.01 GB of weights" in caplog.text
    assert "2 NUMA nodes" in caplog.text or "is not known" in caplog.text
    flags = next(
        part.split("VmFlags:")[1].split("\n")[0].split()
        for part in Path("/proc/self/smaps").read_text().split("\n" + f"{mapping.address:x}-")[1:2]
    )
    assert "rr" not in flags  # MADV_RANDOM is taken back
    try:
        numbers = nodes_of_pages([mapping.address, mapping.address + 4 * MIB])
    except ResourceError:
        pytest.skip("this system does not tell where pages lie")
    assert all(number >= 0 for number in numbers)
