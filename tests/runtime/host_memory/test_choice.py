"""Which store is taken on which machine, and what is said about it."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import ResourceError, UsageError
from krasis.runtime.host.environment import Memory
from krasis.runtime.host_memory import arena, open_store, opening
from krasis.runtime.host_memory.choice import Facts, candidates

GB = 10**9
RECORD = 9_732_096  # Qwen3-235B, INT4 g128
EXPERTS = 94 * 128 * RECORD  # 117.1 GB
CPU_TIER = 241 * GB

BIG = Facts(
    experts_bytes=EXPERTS,
    record_bytes=RECORD,
    num_experts=128,
    available_bytes=1000 * GB,
    reserve_bytes=2 * GB,
    kept_bytes=CPU_TIER,
    filesystems=("ext4",),
)


def methods(facts: Facts) -> dict[str, bool]:
    return {candidate.method: candidate.fits for candidate in candidates(facts)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("in-place", "arena", "ring")),
        # 1 byte decides: 117.1 GB of experts, 241 GB of CPU experts, 2 GB of reserve
        ({"available_bytes": EXPERTS + CPU_TIER + 2 * GB}, ("in-place", "arena", "ring")),
        ({"available_bytes": EXPERTS + CPU_TIER + 2 * GB - 1}, ("ring",)),
        ({"available_bytes": 200 * GB}, ("ring",)),
        # nothing left for the CPU experts: the ring is small, the page cache gives way
        ({"available_bytes": 6 * GB}, ("ring",)),
        ({"available_bytes": 2 * GB + 2 * RECORD}, ("ring",)),
        ({"available_bytes": 2 * GB + 2 * RECORD - 1}, ()),
        # tmpfs: what is there is in RAM already
        ({"filesystems": ("tmpfs",), "available_bytes": 50 * GB, "kept_bytes": 0}, ("in-place", "ring")),
        ({"filesystems": ("hugetlbfs",), "available_bytes": 0}, ("in-place",)),
        ({"filesystems": ("ext4", "tmpfs"), "available_bytes": 50 * GB}, ("ring",)),
        # what the caller allows counts instead of what others need
        ({"ram_limit_bytes": EXPERTS}, ("in-place", "arena", "ring")),
        ({"ram_limit_bytes": EXPERTS - 1}, ("ring",)),
        ({"ram_limit_bytes": EXPERTS, "available_bytes": EXPERTS + 2 * GB - 1}, ("ring",)),
        ({"ram_limit_bytes": 2 * RECORD - 1}, ()),
        ({"group_experts": 32, "ram_limit_bytes": 64 * RECORD - 1}, ()),
        ({"group_experts": 32, "ram_limit_bytes": 64 * RECORD}, ("ring",)),
        ({"ring_bytes": RECORD}, ("in-place", "arena")),
    ],
)
def test_what_fits(changes: dict, expected: tuple[str, ...]):
    facts = dataclasses.replace(BIG, **changes)
    found = candidates(facts)
    assert tuple(candidate.method for candidate in found if candidate.fits) == expected
    assert tuple(candidate.method for candidate in found) == ("in-place", "arena", "ring")
    assert all(candidate.reason for candidate in found)


@pytest.mark.parametrize(
    ("changes", "num_bytes"),
    [
        ({}, 4 * 128 * RECORD),
        ({"group_experts": 16}, 4 * 16 * RECORD),
        ({"group_experts": 16, "ring_bytes": 10 * 16 * RECORD}, 10 * 16 * RECORD),
        # as much as is left, whole experts
        ({"ram_limit_bytes": 100 * RECORD + 5}, 100 * RECORD),
        ({"available_bytes": 2 * GB + 3 * RECORD}, 2 * RECORD),
        ({"available_bytes": 2 * GB + CPU_TIER + 3 * RECORD}, 3 * RECORD),
    ],
)
def test_the_size_of_a_ring(changes: dict, num_bytes: int):
    (ring,) = candidates(dataclasses.replace(BIG, **changes), "ring")
    assert (ring.fits, ring.ring_bytes) == (True, num_bytes)


def test_what_a_rank_may_keep_in_the_page_cache():
    facts = dataclasses.replace(BIG, available_bytes=300 * GB, ram_limit_bytes=5 * GB)
    assert facts.cache_bytes(5 * GB) == 52 * GB
    assert dataclasses.replace(facts, share=0.25).cache_bytes(5 * GB) == 13 * GB
    assert dataclasses.replace(facts, available_bytes=200 * GB).cache_bytes(5 * GB) == 0


def test_reasons_have_the_numbers():
    in_place, arena_, ring = candidates(dataclasses.replace(BIG, available_bytes=300 * GB))
    for part in ("117.1 GB", "300.0 GB available", "2.00 GB reserve", "241.0 GB kept", "57.0 GB of RAM"):
        assert part in arena_.reason
        assert part in in_place.reason
    assert "4.98 GB" in ring.reason  # four layers
    (small,) = candidates(dataclasses.replace(BIG, ram_limit_bytes=RECORD), "ring")
    assert "19.5 MB" in small.reason
    assert "9.73 MB allowed" in small.reason


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="auto, in-place, arena, ring"):
        candidates(BIG, "swap")


def memory(monkeypatch, available: int) -> None:
    """This machine has that much RAM available, and 1 MB in all (so that the reserve is 125 kB)."""
    record = Memory(
        total_bytes=1_000_000,
        available_bytes=available,
        limit_bytes=1_000_000,
        limit_reason="",
        transparent_huge_pages="",
        file_huge_pages="",
        shmem_huge_pages="",
        locked_limit_bytes=None,
    )
    monkeypatch.setattr(opening, "probe_memory", lambda: record)


def test_in_place_comes_first_and_says_so(bundle, device, caplog):
    with caplog.at_level(logging.INFO):
        store = open_store(bundle, device)
    assert (store.method, store.choice.method) == ("in-place", "in-place")
    assert "the bundle's own mapping, registered for reading only" in store.reason
    assert [(attempt.method, attempt.taken) for attempt in store.choice.attempts] == [("in-place", True)]
    assert store.choice.figures["experts_bytes"] == store.num_bytes
    assert store.choice.to_json()["attempts"][0]["reason"] == store.reason
    assert f"host memory: in-place: {store.reason}" in caplog.text
    store.close()


def test_refused_on_a_disk_an_arena_is_next(bundle, device, make_ledger, caplog, expected):
    ledger = make_ledger(lambda _, read_only: read_only)
    with caplog.at_level(logging.INFO):
        store = open_store(bundle, device, registrar=ledger)
    assert store.method == "arena"
    assert [(attempt.method, attempt.taken) for attempt in store.choice.attempts] == [
        ("in-place", False),
        ("arena", True),
    ]
    assert "refused by the test" in store.choice.attempts[0].reason
    assert "not in-place: refused" in caplog.text
    np.testing.assert_array_equal(store.acquire(2, 0, 5).tensor.numpy(), expected[2])
    store.close()


@pytest.mark.parametrize("refuse_read_only", [False, True])
def test_in_ram_the_pages_are_pinned_one_way_or_another(
    in_ram: Path, device, make_ledger, expected, monkeypatch, refuse_read_only: bool
):
    memory(monkeypatch, 0)
    ledger = make_ledger(lambda _, read_only: read_only and refuse_read_only)
    with Bundle.open(in_ram) as bundle:
        store = open_store(bundle, device, registrar=ledger)
        assert store.method == "in-place"
        assert "lies in RAM (tmpfs)" in store.reason
        assert ("writable mapping" in store.reason) == refuse_read_only
        for layer in range(3):
            piece = store.acquire(layer, 0, 5)
            np.testing.assert_array_equal(piece.tensor.numpy(), expected[layer])
            assert all(ledger.holds(part) for part in piece.parts)
        assert all(read_only != refuse_read_only for _, _, read_only in ledger.history)
        assert store.load_report().in_place_bytes == expected.nbytes
        store.close()
    assert ledger.held == {}


def test_files_in_ram_that_may_not_be_written_are_copied(in_ram: Path, device, make_ledger, monkeypatch):
    ledger, real = make_ledger(lambda _, read_only: read_only), os.open

    def open_file(path, flags: int, *arguments, **named) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", open_file)
    with Bundle.open(in_ram) as bundle:
        store = open_store(bundle, device, registrar=ledger)
        assert store.method == "arena"
        assert "Permission denied" in store.choice.attempts[0].reason
        assert "tmpfs lies in memory" in store.reason
        store.close()


def test_too_little_ram_for_an_arena_is_a_ring(bundle, device, monkeypatch, expected):
    record = expected.shape[2]
    kept = sum(blob.num_bytes for blob in bundle.manifest.blobs if blob.tier != "gpu")
    memory(monkeypatch, 125_000 + kept + expected.nbytes - 1)
    store = open_store(bundle, device, group_experts=1)
    assert store.method == "ring"
    assert store.num_bytes == 4 * record
    assert [attempt.taken for attempt in store.choice.attempts] == [False, False, True]
    np.testing.assert_array_equal(store.acquire(1, 3, 1).tensor.numpy()[0], expected[1, 3])
    store.close()
    memory(monkeypatch, 125_000 + kept + expected.nbytes)
    store = open_store(bundle, device)
    assert store.method == "in-place"
    store.close()


def test_too_little_ram_for_anything_is_refused_with_the_numbers(bundle, device, monkeypatch, expected):
    record = expected.shape[2]
    memory(monkeypatch, 125_000 + 2 * record - 1)
    with pytest.raises(ResourceError) as caught:
        open_store(bundle, device)
    text = str(caught.value)
    assert "114.7 kB at least" in text  # two experts
    assert "239.7 kB are available, 125.0 kB of them reserve" in text
    assert all(f"{method}: " in text for method in ("in-place", "arena", "ring"))


@pytest.mark.parametrize("method", ["in-place", "arena"])
def test_a_method_asked_for_is_taken_or_refused_not_replaced(
    bundle, device, monkeypatch, make_ledger, method
):
    memory(monkeypatch, 200_000)
    with pytest.raises(ResourceError, match=rf"got {method}: .*200.0 kB available"):
        open_store(bundle, device, method=method)
    memory(monkeypatch, 10 * GB)
    with pytest.raises(ResourceError, match="refused by the test"):
        open_store(bundle, device, method=method, registrar=make_ledger(lambda *_: True))


def test_an_arena_that_cannot_be_mapped_is_a_ring(bundle, device, monkeypatch, make_ledger):
    def refuse(num_bytes: int, **_: object) -> None:
        raise ResourceError("memory cannot be mapped", got="Cannot allocate memory")

    monkeypatch.setattr(arena, "anonymous", refuse)
    store = open_store(bundle, device, registrar=make_ledger(lambda _, read_only: read_only))
    assert store.method == "ring"
    assert "Cannot allocate memory" in store.choice.attempts[1].reason
    store.close()
