"""The pool of resident experts on the device's double: what launches see, what copies may overwrite, what is
counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from krasis.formats.architecture import Architecture
from krasis.formats.errors import ResourceError, UsageError
from krasis.runtime.device.api import Stream
from krasis.runtime.device.double import OrderingError


def count(rig: Any, residency: Any, experts: list[int], num_tokens: int = 100_000) -> None:
    """As if num_tokens tokens had been routed, each expert (flat index) by every tenth of them."""
    counts = residency.counts

    def add(_: int) -> None:
        counts.view(-1)[torch.tensor(experts)] += num_tokens // 10

    residency.prepare(rig.model.stream)
    rig.model.stream.launch("count", add, reads=(counts,), writes=(counts,))
    residency.note_tokens(rig.model.stream, num_tokens)


def settle(rig: Any, residency: Any, boundaries: int = 40) -> None:
    for _ in range(boundaries):
        residency.update(rig.model.stream)


def device_tables(rig: Any, residency: Any) -> tuple[np.ndarray, np.ndarray]:
    rig.device.synchronize()
    return residency.table.numpy().copy(), residency.mask.numpy().copy()


def check_tables(rig: Any, residency: Any, tiers: Any) -> set[int]:
    """The tables agree with each other, and each address is that of the expert's own bytes. Gives who is
    resident."""
    table, mask = device_tables(rig, residency)
    assert (table == residency.host_addresses).all()
    assert (mask == (table != 0)).all()
    base, record_bytes = residency.memory.data_ptr(), residency.memory.shape[1]
    used = table[table != 0]
    assert len(set(used.tolist())) == len(used)
    for layer, expert in np.argwhere(table != 0):
        slot, rest = divmod(int(table[layer, expert]) - base, record_bytes)
        assert rest == 0
        assert (residency.memory[slot].numpy() == tiers.gpu.layers[layer].experts[expert]).all()
    in_use = sum(len(part) for part in residency.memory_in_use)
    assert in_use == residency.num_resident == len(used)
    return set(np.flatnonzero(table).tolist())


@pytest.mark.parametrize("seed", range(8))
def test_the_hot_ones_move_in_and_out(open_rig: Any, tiers: Any, seed: int) -> None:
    rig = open_rig(seed=seed)
    residency = rig.residency(4)
    residency.prepare(rig.model.stream)
    assert check_tables(rig, residency, tiers) == set()
    for hot in ([0, 5, 7, 17], [0, 5, 8, 9], [1, 2, 3, 4]):
        count(rig, residency, hot)
        settle(rig, residency)
        assert check_tables(rig, residency, tiers) == set(hot)
    assert residency.num_swaps == 6
    assert residency.num_fills == 10
    residency.close()


@pytest.mark.parametrize("seed", range(8))
def test_readers_never_see_a_change(open_rig: Any, seed: int) -> None:
    """Launches read the tables and the slots they name, long before they run; nothing waits for them."""
    rig = open_rig(seed=seed, policy="random" if seed % 2 else "late")
    residency, stream = rig.residency(4), rig.model.stream
    residency.prepare(stream)
    seen: list[tuple[np.ndarray, dict[int, bytes]]] = []
    expected: list[np.ndarray] = []

    def read(stream: Stream) -> None:
        host, parts = residency.host_addresses.copy(), residency.memory_in_use
        base, record_bytes = residency.memory.data_ptr(), residency.memory.shape[1]
        expected.append(host)

        def look(_: int) -> None:
            table = residency.table.numpy().copy()
            slots = ((table[table != 0] - base) // record_bytes).tolist()
            seen.append((table, {slot: residency.memory[slot].numpy().tobytes()[:8] for slot in slots}))

        stream.launch("look", look, reads=(residency.table, residency.mask, *parts), writes=())

    random = np.random.default_rng(seed)
    for _ in range(12):
        count(rig, residency, random.choice(18, 4, replace=False).tolist())
        for _ in range(3):
            read(stream)
            residency.update(stream)
    rig.device.synchronize()
    assert len(seen) == len(expected) == 36
    for (table, _), host in zip(seen, expected, strict=True):
        assert (table == host).all()
    assert residency.num_fills > 0


def test_a_copy_that_does_not_wait_is_noticed(open_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = open_rig(seed=2, policy="late")
    residency, stream = rig.residency(4), rig.model.stream
    residency.fill(stream)
    count(rig, residency, [14, 15, 16, 17])
    rig.device.synchronize()
    stream.launch("read slots", lambda _: None, reads=residency.memory_in_use, writes=())
    monkeypatch.setattr(rig.copies, "wait", lambda event: None)
    with pytest.raises(OrderingError, match="read slots"):
        settle(rig, residency)


def test_counts_are_taken_once(open_rig: Any, shape: Architecture) -> None:
    """However late they are looked at: notes that come too early leave their counts on the device."""
    rig = open_rig(seed=0, policy="late")
    residency, stream = rig.residency(3), rig.model.stream
    taken: list[tuple[int, int]] = []
    add = residency._frequencies.add
    residency._frequencies = type(
        "Spy", (), {"add": lambda _, counts, n: (taken.append((int(counts.sum()), n)), add(counts, n))[0]}
    )()
    routed = 0
    for step in range(9):
        num_tokens = 10 + step
        count(rig, residency, [step, step + 1], num_tokens)
        routed += 2 * (num_tokens // 10)
        if step % 4 == 3:
            rig.device.synchronize()
    rig.device.synchronize()
    residency.note_tokens(stream, 0)
    rig.device.synchronize()
    residency._look()
    assert sum(counts for counts, _ in taken) == routed
    assert sum(tokens for _, tokens in taken) == sum(range(10, 19))
    assert len(taken) < 9


def test_fill_with_all(open_rig: Any, tiers: Any) -> None:
    rig = open_rig(seed=3)
    residency = rig.residency(18)
    residency.fill(rig.model.stream)
    assert residency.is_complete
    residency.finish()
    assert check_tables(rig, residency, tiers) == set(range(18))
    count(rig, residency, [1, 2])
    settle(rig, residency)
    assert residency.num_swaps == 0
    held = [(piece.layer, piece.first, piece.count) for piece, _ in rig.store.held]
    assert held == [(0, 0, 6), (1, 0, 6), (2, 0, 6)]  # each piece was given back


def test_fill_takes_the_most_used_then_shares_by_layer(open_rig: Any, tiers: Any) -> None:
    rig = open_rig(seed=1)
    residency = rig.residency(5)
    count(rig, residency, [13, 16])
    rig.device.synchronize()
    residency.fill(rig.model.stream)
    assert check_tables(rig, residency, tiers) == {13, 16, 0, 6, 12}


def test_nothing_is_fetched_before_it_is_loaded(open_rig: Any) -> None:
    rig = open_rig(seed=1)
    residency = rig.residency(4)
    rig.store.progress = (5, 9)
    count(rig, residency, [1, 2, 3])
    settle(rig, residency)
    assert residency.num_fills == 0
    rig.store.progress = (9, 9)
    count(rig, residency, [1, 2, 3])
    settle(rig, residency)
    assert residency.num_fills == 3


@pytest.mark.parametrize("seed", range(4))
def test_an_expert_that_cannot_be_read(
    open_rig: Any, tiers: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The victims are gone by then: the tables must say so before their slots are given to others."""
    rig = open_rig(seed=seed)
    residency = rig.residency(4)
    residency.fill(rig.model.stream)
    residency.finish()

    def fail(*_: int) -> None:
        raise ResourceError("the disk is gone")

    monkeypatch.setattr(rig.store, "acquire", fail)
    count(rig, residency, [14, 15, 16, 17])
    with pytest.raises(ResourceError):
        settle(rig, residency)
    monkeypatch.undo()
    assert len(check_tables(rig, residency, tiers)) < 4
    count(rig, residency, [14, 15, 16, 17])
    settle(rig, residency)
    assert check_tables(rig, residency, tiers) == {14, 15, 16, 17}


def test_few_copies_at_a_time(open_rig: Any) -> None:
    """From a ring, which reads the disk while the host waits, one a boundary; otherwise more if they arrive
    in time."""
    for method, most in (("ring", 1), ("arena", 4)):
        rig = open_rig(seed=1)
        rig.store.method = method
        residency = rig.residency(10)
        count(rig, residency, list(range(10)))
        fills = []
        for _ in range(30):
            residency.update(rig.model.stream)
            fills.append(residency.num_fills)
        steps = np.diff([0, *fills])
        assert fills[-1] == 10
        assert steps[steps > 0][0] == most
        assert method == "arena" or steps.max() == 1


def test_refusals(open_rig: Any) -> None:
    rig = open_rig()
    for slots in (0, 19):
        with pytest.raises(UsageError, match="resident"):
            rig.residency(slots)
