"""The ring reads ahead in the announced order, never overwrites what a copy may still read, and serves
whatever is asked for."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from krasis.formats.errors import ResourceError, UsageError
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.device.ordering import OrderingError
from krasis.runtime.host.environment import probe_memory
from krasis.runtime.host_memory import PinnedExperts, open_store, opening
from krasis.runtime.host_memory.shards import Shards
from krasis.runtime.planning.host import host_reserve_bytes
from tests.support.patience import PATIENCE_S

ALL = [(layer, first, 1) for layer in range(3) for first in range(5)]


class Gate:
    """An event that is done when the test says so."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.waited = threading.Event()

    def synchronize(self) -> None:
        self.waited.set()
        if not self.done.wait(PATIENCE_S):
            raise TimeoutError

    def is_done(self) -> bool:
        return self.done.is_set()


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """(layer, first byte) of what the ring read, in order."""
    found: list[tuple[int, int]] = []
    original = Shards.read

    def noting(self, layer: int, begin: int, out, *, keep: bool = False) -> None:
        found.append((layer, begin))
        original(self, layer, begin, out, keep=keep)

    monkeypatch.setattr(Shards, "read", noting)
    return found


@pytest.fixture
def record_bytes(expected) -> int:
    return int(expected.shape[2])


@pytest.fixture
def make_ring(bundle, device, record_bytes) -> Iterator[Callable]:
    """Rings of num_slots slots of group_experts experts."""
    made = []

    def make(num_slots: int, group_experts: int = 1, **named):
        store = open_store(
            bundle,
            device,
            method="ring",
            ring_bytes=num_slots * group_experts * record_bytes,
            group_experts=group_experts,
            **named,
        )
        made.append(store)
        assert store.num_slots == num_slots
        assert store.num_bytes == num_slots * group_experts * record_bytes
        return store

    yield make
    for store in made:
        store.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_it_reads_ahead_as_far_as_it_has_slots_and_no_further(make_ring, reads, record_bytes):
    store = make_ring(4)
    store.expect(ALL)
    until(lambda: len(reads) == 4)
    time.sleep(0.02)
    assert reads == [(0, first * record_bytes) for first in range(4)]
    piece = store.acquire(*ALL[0])
    time.sleep(0.02)
    assert len(reads) == 4  # held: not free yet
    gate = Gate()
    gate.done.set()
    store.release(piece, gate)
    until(lambda: len(reads) == 5)
    assert reads[4] == (0, 4 * record_bytes)


def test_a_slot_is_not_overwritten_before_its_event(make_ring, expected, reads):
    store = make_ring(2)
    store.expect(ALL[:4])
    first, second = store.acquire(*ALL[0]), store.acquire(*ALL[1])
    gates = Gate(), Gate()
    store.release(first, gates[0])
    store.release(second, gates[1])
    assert gates[0].waited.wait(PATIENCE_S)
    time.sleep(0.02)
    np.testing.assert_array_equal(first.tensor.numpy()[0], expected[0, 0])
    np.testing.assert_array_equal(second.tensor.numpy()[0], expected[0, 1])
    assert len(reads) == 2
    gates[0].done.set()
    third = store.acquire(*ALL[2])
    assert third.tensor.data_ptr() == first.tensor.data_ptr()
    np.testing.assert_array_equal(third.tensor.numpy()[0], expected[0, 2])
    np.testing.assert_array_equal(second.tensor.numpy()[0], expected[0, 1])
    gates[1].done.set()
    store.acquire(*ALL[3])


def test_the_first_event_that_is_done_frees_a_slot(make_ring, expected):
    """A copy that lingers does not hold up the others."""
    store = make_ring(3)
    store.expect([])
    slow, fast = Gate(), Gate()
    fast.done.set()
    lingering = store.acquire(0, 0, 1)
    others = [store.acquire(0, 1, 1), store.acquire(0, 2, 1)]
    store.release(lingering, slow)
    for piece in others:
        store.release(piece, fast)
    for layer in range(3):
        for first in range(5):
            piece = store.acquire(layer, first, 1)
            np.testing.assert_array_equal(piece.tensor.numpy()[0], expected[layer, first])
            store.release(piece, fast)
    np.testing.assert_array_equal(lingering.tensor.numpy()[0], expected[0, 0])
    assert not slow.waited.is_set()
    slow.done.set()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_slots", [2, 3, 7])
def test_reuse_is_ordered_after_the_copies(bundle, record_bytes, expected, seed: int, num_slots: int):
    """The double checks that no slot is written while a copy out of it is not known to be done."""
    device = DeviceDouble(seed)
    store = open_store(
        bundle, device, method="ring", ring_bytes=2 * num_slots * record_bytes, group_experts=2
    )
    stream = device.stream("copy")
    random = np.random.default_rng(seed)
    for _ in range(3):
        groups = [(layer, at, min(2, 5 - at)) for layer in range(3) for at in (0, 2, 4)]
        store.expect(groups)
        copies = []
        for layer, first, count in groups:
            if random.random() < 0.2:
                continue  # nobody was routed there
            piece = store.acquire(layer, first, count)
            target = device.empty((count, record_bytes), torch.uint8)
            stream.copy(target, piece.parts[0])
            store.release(piece, stream.record())
            copies.append((layer, first, count, target))
        stream.synchronize()
        for layer, first, count, target in copies:
            np.testing.assert_array_equal(target.numpy(), expected[layer, first : first + count])
    store.close()
    device.close()


def test_an_event_of_the_wrong_moment_is_found_by_the_double(bundle, record_bytes):
    """The test above can fail: for an event recorded before the copy the ring overwrites what is read."""
    device = DeviceDouble(policy="late")
    store = open_store(bundle, device, method="ring", ring_bytes=2 * record_bytes, group_experts=1)
    stream = device.stream("copy")
    store.expect(ALL)

    def copy_all() -> None:
        for group in ALL:
            too_early = stream.record()
            piece = store.acquire(*group)
            stream.copy(device.empty((1, record_bytes), torch.uint8), piece.parts[0])
            store.release(piece, too_early)

    with pytest.raises(OrderingError, match="the host overwrites"):
        copy_all()
    stream.synchronize()
    store.close()


@pytest.mark.parametrize("seed", range(6))
def test_any_order_is_served(make_ring, expected, seed: int):
    """Announced or not, skipped, repeated, in any order, with up to all but one slot held."""
    random = np.random.default_rng(seed)
    store = make_ring(3, 2)
    done = Gate()
    done.done.set()
    held = []
    store.expect([(layer, first, 2) for layer in range(3) for first in range(4)])
    for step in range(60):
        if step % 20 == 19:
            store.expect([(int(random.integers(3)), int(random.integers(4)), 2) for _ in range(6)])
        count = int(random.integers(1, 3))
        layer, first = int(random.integers(3)), int(random.integers(6 - count))
        held.append(store.acquire(layer, first, count))
        for piece in held:
            wanted = expected[piece.layer, piece.first : piece.first + piece.count]
            np.testing.assert_array_equal(piece.tensor.numpy(), wanted)
        while len(held) > 2 or (held and random.random() < 0.5):
            store.release(held.pop(int(random.integers(len(held)))), done)


def test_a_group_that_comes_while_another_is_being_read_makes_room(make_ring, monkeypatch, expected):
    """Both slots are taken, one held and one being filled with something else: no dead lock."""
    store = make_ring(2)
    held = store.acquire(0, 0, 1)
    goes_on, began, original = threading.Event(), threading.Event(), Shards.read

    def slowly(self, layer: int, begin: int, out, *, keep: bool = False) -> None:
        began.set()
        goes_on.wait(PATIENCE_S)
        original(self, layer, begin, out, keep=keep)

    monkeypatch.setattr(Shards, "read", slowly)
    store.expect([(1, 0, 1), (2, 0, 1)])
    assert began.wait(PATIENCE_S)
    threading.Timer(0.05, goes_on.set).start()
    np.testing.assert_array_equal(store.acquire(2, 4, 1).tensor.numpy()[0], expected[2, 4])
    np.testing.assert_array_equal(held.tensor.numpy()[0], expected[0, 0])


def test_what_was_read_ahead_is_kept_if_the_next_pass_begins_with_it(make_ring, reads, record_bytes):
    store = make_ring(3)
    store.expect(ALL[:3])
    until(lambda: len(reads) == 3)
    store.acquire(*ALL[2])
    store.expect([ALL[1], ALL[9]])
    until(lambda: len(reads) == 4)
    store.acquire(*ALL[1])
    assert reads[3] == (1, 4 * record_bytes)
    assert len(reads) == 4


def test_slots_are_cut_anew_for_other_groups(make_ring, expected, record_bytes):
    store = make_ring(8)
    store.expect([(0, 0, 4), (1, 0, 3)])
    assert store.num_slots == 2
    np.testing.assert_array_equal(store.acquire(0, 0, 4).tensor.numpy(), expected[0, :4])
    piece = store.acquire(1, 0, 3)
    with pytest.raises(UsageError, match="while others are held"):
        store.expect([(0, 0, 5)])
    done = Gate()
    done.done.set()
    store.release(piece, done)


def test_smaller_groups_get_more_slots(make_ring, expected):
    store = make_ring(2, 4)
    store.expect(ALL)
    assert store.num_slots == 8
    np.testing.assert_array_equal(store.acquire(*ALL[0]).tensor.numpy()[0], expected[0, 0])


def test_a_group_too_large_for_the_ring_is_refused_with_numbers(make_ring, record_bytes, expected):
    store = make_ring(2, 2)
    with pytest.raises(ResourceError, match=f"got {4 * record_bytes} bytes; limit {6 * record_bytes} bytes"):
        store.expect([(0, 0, 3)])
    # and the ring goes on
    np.testing.assert_array_equal(store.acquire(2, 0, 2).tensor.numpy(), expected[2, :2])


def test_holding_every_slot_is_a_mistake_not_a_dead_lock(make_ring):
    store = make_ring(2)
    pieces = [store.acquire(0, 0, 1), store.acquire(0, 1, 1)]
    with pytest.raises(UsageError, match="every slot of the ring is held"):
        store.acquire(0, 2, 1)
    done = Gate()
    done.done.set()
    store.release(pieces[0], done)
    store.acquire(0, 2, 1)
    with pytest.raises(UsageError, match="not held"):
        store.release(PinnedExperts(0, 0, 1, (), 7), done)


def test_closing_ends_the_reader_and_unpins(bundle, ledger, device, record_bytes):
    device.host_writes = lambda *_: None
    store = open_store(bundle, device, method="ring", ring_bytes=4 * record_bytes, registrar=ledger)
    store.expect(ALL)
    held = store.acquire(*ALL[0])
    copy = held.tensor.clone()
    assert all(ledger.holds(part) for part in held.parts)
    store.close()
    store.close()
    assert ledger.held == {}
    assert torch.equal(held.tensor, copy)
    for action in (lambda: store.acquire(*ALL[1]), lambda: store.expect(ALL)):
        with pytest.raises(UsageError, match="closed"):
            action()


def test_what_the_page_cache_can_keep_is_read_through_it(bundle, device, record_bytes, monkeypatch):
    """Two experts of RAM beside the ring keep the first two; the others would only push them out."""
    kept = []
    original = Shards.read

    def noting(self, layer: int, begin: int, out, *, keep: bool = False) -> None:
        kept.append(((layer, begin // record_bytes), keep))
        original(self, layer, begin, out, keep=keep)

    monkeypatch.setattr(Shards, "read", noting)
    others = sum(blob.num_bytes for blob in bundle.manifest.blobs if blob.tier != "gpu")
    found = probe_memory()
    # two experts for the ring, two for the cache and a little
    available = host_reserve_bytes(found.limit_bytes) + others + 4 * record_bytes + 99
    memory = dataclasses.replace(found, available_bytes=available)
    monkeypatch.setattr(opening, "probe_memory", lambda: memory)
    store = open_store(
        bundle,
        device,
        method="ring",
        group_experts=1,
        ring_bytes=2 * record_bytes,
        ram_limit_bytes=2 * record_bytes,
    )
    done = Gate()
    done.done.set()
    for group in ALL:
        store.release(store.acquire(*group), done)
    store.close()
    assert [place for place, keep in kept if keep] == [(0, 0), (0, 1)]
    assert len(kept) == len(ALL)
