"""Every store gives exactly the bytes of the files, to every rank, group by group, from pinned memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import UsageError
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.host_memory import loader, open_store, pinned_store, ring, slots

METHODS = ("in-place", "arena", "ring")
RANKS = [(0, 5), (0, 2), (2, 2), (4, 1)]


def groups_of(first: int, count: int, size: int) -> list[tuple[int, int, int]]:
    """All experts of a rank, layer by layer, in groups of at most size."""
    end = first + count
    return [(layer, at, min(size, end - at)) for layer in range(3) for at in range(first, end, size)]


def run_pass(store, device: DeviceDouble, groups) -> list[torch.Tensor]:
    """Copies every group to device memory of its own, as prefill does."""
    stream = device.stream("copy")
    store.expect(groups)
    copies = []
    for layer, first, count in groups:
        piece = store.acquire(layer, first, count)
        target = device.empty((count, store.record_bytes), torch.uint8)
        row = 0
        for part in piece.parts:
            stream.copy(target[row : row + len(part)], part)
            row += len(part)
        assert row == count
        store.release(piece, stream.record())
        copies.append(target)
    stream.synchronize()
    return copies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_a_pass_copies_the_files_bytes(bundle: Bundle, expected: np.ndarray, method: str, seed: int):
    device = DeviceDouble(seed)
    store = open_store(bundle, device, method=method, group_experts=2)
    assert store.method == method
    groups = groups_of(0, 5, 2)
    for _ in range(2):
        for (layer, first, count), copy in zip(groups, run_pass(store, device, groups), strict=True):
            np.testing.assert_array_equal(copy.numpy(), expected[layer, first : first + count])
    store.close()
    device.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("first", "count"), RANKS)
def test_a_rank_holds_its_experts_only(bundle, device, expected, method: str, first: int, count: int):
    store = open_store(bundle, device, first_expert=first, num_experts=count, method=method)
    assert (store.first_expert, store.num_experts) == (first, count)
    if method != "ring":
        assert store.num_bytes == 3 * count * store.record_bytes
    groups = groups_of(first, count, 3)
    for (layer, at, size), copy in zip(groups, run_pass(store, device, groups), strict=True):
        np.testing.assert_array_equal(copy.numpy(), expected[layer, at : at + size])
    for wrong in ((0, first - 1, 1), (0, first, count + 1), (3, first, 1), (-1, first, 1), (0, first, 0)):
        with pytest.raises(UsageError, match="no such group"):
            store.acquire(*wrong)
        with pytest.raises(UsageError, match="no such group"):
            store.expect([wrong])
    store.close()


@pytest.mark.parametrize("method", METHODS)
def test_experts_spread_over_many_files(many_shards: Path, device, expected, method: str):
    with Bundle.open(many_shards) as bundle:
        assert sum(file.name.startswith("gpu-") for file in bundle.manifest.files) == 3
        store = open_store(bundle, device, method=method)
        for layer in range(3):
            piece = store.acquire(layer, 1, 3)
            np.testing.assert_array_equal(piece.tensor.numpy(), expected[layer, 1:4])
            store.release(piece, device.stream("copy").record())
        store.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_no_part_of_a_piece_spans_two_registrations(
    bundle, device, ledger, expected, monkeypatch, method: str, rows: int
):
    record = expected.shape[2]
    monkeypatch.setattr(pinned_store, "MAX_REGISTERED_BYTES", rows * record + 17)
    monkeypatch.setattr(slots, "MAX_REGISTERED_BYTES", rows * record + 17)
    monkeypatch.setattr(loader, "CHUNK_BYTES", 3 * 4096)
    monkeypatch.setattr(ring, "CHUNK_BYTES", 3 * 4096)
    device.host_writes = lambda *_: None  # its memory is not registered with the double
    store = open_store(bundle, device, method=method, registrar=ledger)
    event = device.stream("copy").record()
    for layer in range(3):
        for first in range(5):
            for count in range(1, 6 - first):
                piece = store.acquire(layer, first, count)
                found = np.concatenate([part.numpy() for part in piece.parts])
                np.testing.assert_array_equal(found, expected[layer, first : first + count])
                assert all(ledger.holds(part) for part in piece.parts)
                store.release(piece, event)
    assert max(size for _, size, _ in ledger.history[1:]) <= rows * record
    store.close()
    assert ledger.held == {}


def test_an_arena_pins_exactly_the_experts(bundle, device, ledger, expected):
    store = open_store(bundle, device, method="arena", registrar=ledger)
    store.wait_loaded()
    assert store.num_bytes == expected.nbytes
    assert sum(ledger.held.values()) == expected.nbytes
    assert all(not read_only for _, _, read_only in ledger.history)
    report = store.load_report()
    assert (report.num_bytes, report.total_bytes, report.finished) == (expected.nbytes, expected.nbytes, True)
    assert report.direct_bytes + report.cached_bytes == expected.nbytes
    assert report.in_place_bytes == 0
    store.close()


def test_in_place_the_files_pages_are_pinned_and_nothing_is_copied(bundle, device, ledger, expected):
    store = open_store(bundle, device, method="in-place", registrar=ledger)
    for layer in range(3):
        address = bundle.map(f"layers.{layer}.experts.gpu").ctypes.data
        assert store.acquire(layer, 2, 2).tensor.data_ptr() == address + 2 * expected.shape[2]
    assert all(read_only for _, _, read_only in ledger.history)
    report = store.load_report()
    assert (report.in_place_bytes, report.direct_bytes, report.cached_bytes) == (expected.nbytes, 0, 0)
    store.close()


def test_pieces_outlive_the_store(bundle, device, expected):
    """Memory goes with its last view: closing too early is a copy from unpinned memory, not a crash."""
    pieces = []
    for method in ("arena", "in-place"):
        store = open_store(bundle, device, method=method)
        pieces.append(store.acquire(1, 0, 5))
        store.close()
        store.close()
        with pytest.raises(UsageError, match="closed"):
            store.acquire(0, 0, 1)
    for piece in pieces:
        np.testing.assert_array_equal(piece.tensor.numpy(), expected[1])
