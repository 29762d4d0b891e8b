"""A state of matrices that tokens overwrite: where a sequence can go back to, and what is exported."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Experts, Router
from krasis.formats.models.recurrent import GatedDelta
from krasis.formats.models.spec import Layer, ModelSpec, Norm
from krasis.formats.models.state import SNAPSHOTS, fixed_bytes
from krasis.runtime.batch import batch_of
from krasis.runtime.state.hybrid_store import HybridStore, state_store
from krasis.runtime.state.kv_store import KvStore

DELTA = GatedDelta(2, 4, 32, 48, 4)
ATTENTION = Attention(2, 1, 32, None, 32**-0.5)
EXPERTS = Experts(4, 32, Router(2))
SPEC = ModelSpec(
    "qwen3_next",
    64,
    32,
    128,
    Norm(1e-6),
    (Layer(DELTA, EXPERTS), Layer(ATTENTION, EXPERTS), Layer(DELTA, EXPERTS)),
)


@pytest.fixture
def store() -> HybridStore:
    made = state_store(SPEC, 128, "f16", 2)
    assert isinstance(made, HybridStore)
    return made


def run(store: HybridStore, slot: int, start: int, count: int, *, breaks: bool = False) -> None:
    """Tokens that leave their slot's end as the value of everything."""
    batch = batch_of([(slot, start, [0] * count, "none")])
    store.begin(batch)
    for layer in (0, 2):
        matrices, columns = store.fixed(slot, layer)
        matrices[...] = columns[...] = start + count + 1000 * layer
    if not breaks:
        store.advance(batch.spans)


def value(store: HybridStore, slot: int, layer: int = 2) -> float:
    matrices, columns = store.fixed(slot, layer)
    found = {*np.unique(matrices), *np.unique(columns)}
    assert len(found) == 1
    return float(found.pop()) - 1000 * layer


def test_models_of_attention_have_the_store_that_they_had() -> None:
    assert (
        type(state_store(ModelSpec("mixtral", 64, 32, 128, Norm(1e-6), SPEC.layers[1:2]), 8, "f16"))
        is KvStore
    )


def test_goes_back_to_copies_alone(store: HybridStore) -> None:
    slot = store.open()
    run(store, slot, 0, 10)
    store.checkpoint(slot)
    run(store, slot, 10, 20)
    assert [store.restorable(slot, at) for at in (0, 9, 10, 29, 30, 99)] == [0, 0, 10, 10, 30, 30]
    with pytest.raises(NativeError, match="gone back"):
        store.rewind(slot, 29)
    store.rewind(slot, 10)
    assert (store.length(slot), value(store, slot), value(store, slot, 0)) == (10, 10, 10)
    run(store, slot, 10, 3)
    assert [store.restorable(slot, at) for at in (12, 13)] == [10, 13]
    store.rewind(slot, 0)
    assert store.restorable(slot, 5) == 0


def test_a_batch_begins_where_its_slot_can_be(store: HybridStore) -> None:
    slot = store.open()
    run(store, slot, 0, 10)
    store.checkpoint(slot)
    run(store, slot, 10, 5)
    with pytest.raises(NativeError, match=r"gone back[\s\S]*12 of slot 0"):
        store.begin(batch_of([(slot, 12, [0], "none")]))
    with pytest.raises(NativeError, match="in order"):
        store.begin(batch_of([(slot, 16, [0], "none")]))
    assert store.length(slot) == 15
    run(store, slot, 10, 1)
    assert (store.length(slot), value(store, slot)) == (11, 11)


def test_a_pass_that_broke_off_leaves_only_copies(store: HybridStore) -> None:
    slot = store.open()
    run(store, slot, 0, 10)
    store.checkpoint(slot)
    run(store, slot, 10, 5)
    run(store, slot, 15, 5, breaks=True)
    assert store.restorable(slot, 15) == 10
    store.checkpoint(slot)  # of nothing
    store.rewind(slot, 10)
    assert (store.restorable(slot, 15), value(store, slot)) == (10, 10)


def test_keeps_the_first_and_the_newest_copies(store: HybridStore) -> None:
    slot = store.open()
    for start in range(0, 80, 10):
        run(store, slot, start, 10)
        store.checkpoint(slot)
        store.checkpoint(slot)
    kept = sorted({store.restorable(slot, at) for at in range(81)} - {0})
    assert kept == [10, *range(80 - 10 * (SNAPSHOTS - 2), 81, 10)]
    for at in reversed(kept):
        store.rewind(slot, at)
        assert value(store, slot) == at


def test_a_slot_that_is_opened_again_remembers_nothing(store: HybridStore) -> None:
    slot = store.open()
    run(store, slot, 0, 10)
    store.checkpoint(slot)
    store.close(slot)
    assert store.open() == slot
    assert store.restorable(slot, 50) == store.length(slot) == 0


def test_another_slot_goes_on_from_what_was_exported(store: HybridStore) -> None:
    first, second = store.open(), store.open()
    run(store, first, 0, 10)
    store.checkpoint(first)
    run(store, first, 10, 10)
    run(store, second, 0, 7)
    store.checkpoint(second)
    with pytest.raises(NativeError, match="not kept"):
        store.export(first, 0, 15)
    for layer in range(3):
        store.import_(second, layer, *store.export(first, layer, 10))
    assert (store.length(second), value(store, second)) == (10, 10)
    assert [store.restorable(second, at) for at in (8, 10)] == [
        0,
        10,
    ]  # the copy at 7 was of another sequence


def test_slots_do_not_share_memory(store: HybridStore) -> None:
    first, second = store.open(), store.open()
    run(store, first, 0, 5)
    run(store, second, 0, 6)
    keys, _ = store.layer(first, 1)
    keys[...] = 3
    assert (value(store, first), value(store, second)) == (5, 6)
    assert store.fixed(first, 0)[0].ctypes.data % 64 == 0


def test_memory_counts_matrices_and_copies(store: HybridStore) -> None:
    matrices = 4 * 32 * 48 * 4
    columns = 3 * (2 * 2 * 32 + 4 * 48) * 4
    assert fixed_bytes(SPEC) == 2 * (matrices + columns) == store.fixed_bytes
    assert store.slot_bytes == 2 * 128 * 32 * 2 + (1 + SNAPSHOTS) * store.fixed_bytes
