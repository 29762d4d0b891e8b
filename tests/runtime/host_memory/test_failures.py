"""What goes wrong while experts are loaded reaches whoever waits for them, and leaves nothing pinned."""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import (
    FormatError,
    KrasisError,
    MismatchError,
    NativeError,
    ResourceError,
    UsageError,
)
from krasis.runtime.host_memory import arena, in_place, loader, open_store, reader
from krasis.runtime.host_memory.reader import ShardReader
from krasis.runtime.host_memory.registrar import RegistrationError
from tests.support.patience import PATIENCE_S

METHODS = ("in-place", "arena", "ring")


@pytest.fixture
def mapped(monkeypatch) -> list[weakref.ref]:
    """The anonymous memory that was mapped."""
    found: list[weakref.ref] = []
    original = arena.anonymous

    def noting(*arguments, **named):
        array = original(*arguments, **named)
        found.append(weakref.ref(array.base))
        return array

    monkeypatch.setattr(arena, "anonymous", noting)
    monkeypatch.setattr(in_place, "anonymous", noting)
    return found


def all_gone(mapped: list[weakref.ref]) -> bool:
    gc.collect()
    return all(reference() is None for reference in mapped)


def drop_from_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_shrank_is_named(own_bundle: Path, make_bundle, device, method: str):
    with Bundle.open(own_bundle) as bundle:
        last = bundle.blob("layers.2.experts.gpu")
        end = last.offset_bytes + 3 * 4096
        bundle.map(last.name)
        os.truncate(own_bundle / last.file, end)
        store = open_store(bundle, device, method=method)
        store.acquire(0, 0, 5)
        with pytest.raises(FormatError, match="file ends too early") as caught:
            store.acquire(2, 0, 5)
        assert last.file in str(caught.value)
        assert str(end) in str(caught.value)
        store.close()
    with Bundle.open(make_bundle(own_bundle.with_name("early.krasis"))) as bundle:
        os.truncate(bundle.path / last.file, end)
        with pytest.raises(FormatError, match=f"{last.file}: shard has another size.*got {end} bytes"):
            open_store(bundle, device, method=method)


@pytest.mark.parametrize("method", ["arena", "ring"])
def test_an_io_error_is_carried_to_the_caller(bundle, device, monkeypatch, mapped, method: str):
    real, bad = os.preadv, bundle.blob("layers.1.experts.gpu").offset_bytes

    def preadv(fd: int, buffers, offset: int) -> int:
        if offset >= bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    store = open_store(bundle, device, method=method)
    store.acquire(0, 0, 1)
    with pytest.raises(ResourceError, match=f"Input/output error at offset {bad}"):
        store.acquire(1, 0, 1)
    if method == "arena":
        store.acquire(0, 0, 5)  # what came before is there
        with pytest.raises(ResourceError, match="Input/output error"):
            store.wait_loaded()
    assert not store.is_loading
    store.close()
    assert all_gone(mapped)


@pytest.mark.parametrize("nth", [2, 3, 4])
def test_a_refused_registration_ends_an_arena_and_frees_it(bundle, device, make_ledger, mapped, nth: int):
    ledger = make_ledger(lambda count, _: count == nth)
    store = open_store(bundle, device, method="arena", registrar=ledger)  # its first call is a trial
    with pytest.raises(RegistrationError, match="refused by the test"):
        store.wait_loaded()
    assert not store.load_report().finished
    store.close()
    assert ledger.held == {}
    assert all_gone(mapped)


def test_a_refused_piece_in_place_is_copied(bundle, device, make_ledger, mapped, expected, caplog):
    ledger = make_ledger(lambda count, read_only: read_only and count > 2)
    with caplog.at_level(logging.WARNING):
        store = open_store(bundle, device, method="in-place", registrar=ledger, num_threads=1)
        store.wait_loaded()
    for layer in range(3):
        np.testing.assert_array_equal(store.acquire(layer, 0, 5).tensor.numpy(), expected[layer])
        assert ledger.holds(store.acquire(layer, 0, 5).parts[0])
    assert store.load_report().in_place_bytes == expected[0].nbytes
    assert "copied instead" in caplog.text
    store.close()
    assert ledger.held == {}
    assert all_gone(mapped)


def test_a_refused_piece_in_ram_is_not_copied_beyond_the_budget(in_ram: Path, device, make_ledger, mapped):
    ledger = make_ledger(lambda count, _: count > 2)
    with Bundle.open(in_ram) as bundle:
        store = open_store(bundle, device, registrar=ledger, ram_limit_bytes=4096)
        assert store.method == "in-place"
        with pytest.raises(RegistrationError):
            store.wait_loaded()
        store.close()
    assert ledger.held == {}
    assert mapped == []


def test_a_ring_whose_slots_are_refused_is_no_ring(bundle, device, make_ledger):
    ledger = make_ledger(lambda count, _: count == 3)
    with pytest.raises(ResourceError, match=r"cannot be pinned.*ring: .*refused by the test"):
        open_store(bundle, device, method="ring", registrar=ledger)
    assert ledger.held == {}


def test_nothing_can_be_pinned(bundle, device, make_ledger, memlock):
    memlock(65536)
    ledger = make_ledger(lambda *_: True)
    with pytest.raises(ResourceError) as caught:
        open_store(bundle, device, registrar=ledger)
    text = str(caught.value)
    assert all(f"{method}: " in text for method in METHODS)
    assert "ulimit -l" in text
    assert "65536" in text


def test_loading_goes_on_in_the_background_in_the_order_of_layers(bundle, device, monkeypatch, expected):
    gate, real = threading.Semaphore(0), ShardReader.read
    monkeypatch.setattr(loader, "CHUNK_BYTES", 4096 * 8)

    def read(self, *arguments, **named) -> None:
        gate.acquire()
        real(self, *arguments, **named)

    monkeypatch.setattr(ShardReader, "read", read)
    store = open_store(bundle, device, method="arena", num_threads=1)
    chunks = -(-expected[0].nbytes // (4096 * 8))
    assert store.load_progress() == (0, expected.nbytes)
    assert store.is_loading
    assert store.load_report().remaining_s == pytest.approx(expected.nbytes / 20e9)
    gate.release(chunks)
    np.testing.assert_array_equal(store.acquire(0, 0, 5).tensor.numpy(), expected[0])
    assert store.load_progress() == (expected[0].nbytes, expected.nbytes)
    assert not store.load_report().finished
    waiting = threading.Thread(target=store.acquire, args=(1, 0, 1))
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    gate.release(2 * chunks)
    waiting.join(PATIENCE_S)
    store.wait_loaded()
    assert store.load_progress() == (expected.nbytes, expected.nbytes)
    assert not store.is_loading
    assert store.load_report().remaining_s == 0.0
    store.close()


def test_closing_while_it_loads_stops_and_frees(bundle, device, ledger, monkeypatch, mapped):
    began, goes_on, real = threading.Event(), threading.Event(), ShardReader.read

    def read(self, *arguments, **named) -> None:
        began.set()
        goes_on.wait(PATIENCE_S)
        real(self, *arguments, **named)

    monkeypatch.setattr(ShardReader, "read", read)
    monkeypatch.setattr(loader, "CHUNK_BYTES", 4096)
    store = open_store(bundle, device, method="arena", registrar=ledger, num_threads=1)
    assert began.wait(PATIENCE_S)
    errors: list[KrasisError] = []

    def acquire() -> None:
        try:
            store.acquire(2, 0, 1)
        except KrasisError as error:
            errors.append(error)

    waiting = threading.Thread(target=acquire)
    waiting.start()
    closing = threading.Thread(target=store.close)
    closing.start()
    waiting.join(PATIENCE_S)
    assert "closed" in str(errors[0])
    goes_on.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert store.load_progress()[0] == 0
    assert ledger.held == {}
    assert all_gone(mapped)


def test_pieces_are_unpinned_side_by_side(bundle, device, ledger, monkeypatch):
    """Unpinning a hundred gigabytes one after the other would hold up the end of a command for seconds."""
    store = open_store(bundle, device, method="in-place", registrar=ledger)
    store.wait_loaded()
    together, real = threading.Barrier(3, timeout=PATIENCE_S), ledger.unregister

    def unregister(memory) -> None:
        together.wait()
        real(memory)

    monkeypatch.setattr(ledger, "unregister", unregister)
    assert len(ledger.held) == 3
    store.close()
    assert ledger.held == {}


def test_a_thread_that_dies_of_a_bug_leaves_nobody_waiting(bundle, device, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(ShardReader, "read", lambda *_, **__: 1 / 0)
    for method in ("arena", "ring"):
        store = open_store(bundle, device, method=method)
        with pytest.raises(NativeError, match="unexpectedly"):
            store.acquire(0, 0, 1)
        store.close()


def test_a_bundle_exchanged_while_it_was_open_is_noticed(own_bundle: Path, device):
    with Bundle.open(own_bundle) as bundle:
        shard = own_bundle / bundle.blob("layers.0.experts.gpu").file
        shard.rename(shard.with_suffix(".old"))
        shard.write_bytes(b"\0" * bundle.manifest.files[-1].num_bytes)
        with pytest.raises(FormatError, match="exchanged"):
            open_store(bundle, device)


def test_direct_reads_are_used_for_what_is_not_cached(own_bundle: Path, device, expected):
    with Bundle.open(own_bundle) as bundle:
        shard = own_bundle / bundle.blob("layers.0.experts.gpu").file
        probe = ShardReader(os.open(shard, os.O_RDONLY), str(shard))
        probe.close()
        if probe.why_buffered:
            pytest.skip(f"{probe.filesystem}: {probe.why_buffered}")
        drop_from_cache(shard)
        store = open_store(bundle, device, method="arena")
        store.wait_loaded()
        report = store.load_report()
        assert report.direct_bytes == expected.nbytes
        np.testing.assert_array_equal(store.acquire(2, 0, 5).tensor.numpy(), expected[2])
        store.close()
        # now it is in the cache
        shard.read_bytes()
        store = open_store(bundle, device, method="arena")
        store.wait_loaded()
        assert store.load_report().cached_bytes == expected.nbytes
        store.close()


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_file_system_without_direct_reads(
    own_bundle: Path, device, expected, monkeypatch, caplog, where: str
):
    real_open, real_read, direct = os.open, os.preadv, set()

    def open_file(path, flags: int, *arguments, **named) -> int:
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = real_open(path, flags, *arguments, **named)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def preadv(fd: int, buffers, offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(reader, "WARM_SHARE", 2.0)  # nothing counts as cached
    with Bundle.open(own_bundle) as bundle, caplog.at_level(logging.WARNING):
        store = open_store(bundle, device, method="arena")
        for layer in range(3):
            np.testing.assert_array_equal(store.acquire(layer, 0, 5).tensor.numpy(), expected[layer])
        assert store.load_report().direct_bytes == 0
        assert ("direct reads are refused" in store.reason) == (where == "open")
        store.close()
    assert caplog.text.count("direct reads are refused: Invalid argument") == 1


def test_a_direct_read_that_ends_inside_a_block_goes_on_buffered(bundle, device, expected, monkeypatch):
    """Some file systems return less than was asked for; the rest must be read, at whole blocks."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:5000]], offset))
    monkeypatch.setattr(reader, "WARM_SHARE", 2.0)
    store = open_store(bundle, device, method="arena")
    np.testing.assert_array_equal(store.acquire(1, 0, 5).tensor.numpy(), expected[1])
    store.close()


def test_no_such_tier_or_experts(bundle, device, tmp_path, make_bundle):
    dense = make_bundle(tmp_path / "dense.krasis", tiers=("dense",))
    with Bundle.open(dense) as opened, pytest.raises(MismatchError, match="no gpu experts"):
        open_store(opened, device)
    for first, count in ((5, None), (-1, 2), (3, 3), (0, 0)):
        with pytest.raises(UsageError, match="no such experts"):
            open_store(bundle, device, first_expert=first, num_experts=count)
    with pytest.raises(UsageError, match="unknown store"):
        open_store(bundle, device, method="disk")
