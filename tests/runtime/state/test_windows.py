"""Layers with a window keep a ring of positions: where a sequence can go back to, what is exported, and how
many bytes there are, for every kind of state.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Experts, Router
from krasis.formats.models.registry import spec_from_hf
from krasis.formats.models.spec import Layer, ModelSpec, Norm
from krasis.formats.models.state import SNAPSHOTS, TAIL_TOKENS, ring_positions, ring_rows
from krasis.runtime.batch import batch_of
from krasis.runtime.planning import sizes_of_shape
from krasis.runtime.state.hybrid_store import HybridStore, state_store
from krasis.runtime.state.kv_store import import_layer

CONFIGS = Path(__file__).parents[2] / "formats" / "models" / "configs"
FULL = Attention(2, 1, 32, None, 32**-0.5)
WINDOW = dataclasses.replace(FULL, window=100)
EXPERTS = Experts(4, 32, Router(2))
SPEC = ModelSpec("gpt_oss", 64, 32, 4096, Norm(1e-6), (Layer(WINDOW, EXPERTS), Layer(FULL, EXPERTS)))
ROWS, CAPACITY = 192, 1000
BACK = ROWS - 100 + 1  # as far back as the ring goes


@pytest.fixture
def store() -> HybridStore:
    made = state_store(SPEC, CAPACITY, "f32", 2)
    assert isinstance(made, HybridStore)
    return made


def run(store: HybridStore, slot: int, start: int, count: int, *, breaks: bool = False) -> None:
    """Tokens whose keys are their positions and whose values are these halved."""
    for begin in range(start, start + count, 50):
        end = min(begin + 50, start + count)
        batch = batch_of([(slot, begin, [0] * (end - begin), "none")])
        store.begin(batch)
        positions = np.arange(begin, end, dtype=np.float32)[None, :, None]
        rows = np.broadcast_to(positions, (1, end - begin, 32))
        for layer in range(2):
            keys, values, first = store.extend(slot, layer, begin, rows, rows / 2)
            seen = max(0, begin - 99) if layer == 0 else 0
            assert (first, keys.shape[1]) == (seen, end - seen)
            np.testing.assert_array_equal(keys[0, :, 0], np.arange(seen, end))
            np.testing.assert_array_equal(2 * values, keys)
        if not breaks:
            store.advance(batch.spans)


def test_a_ring_has_room_for_what_is_computed_at_once() -> None:
    for window in (1, 63, 64, 65, 100, 128, 1024, 4096):
        assert ring_positions(window) % 64 == 0
        assert window + 63 <= ring_positions(window) < window + 128
        assert ring_positions(window) - window + 1 == ring_rows(window) > 64


def test_goes_back_as_far_as_the_ring(store: HybridStore) -> None:
    slot = store.open()
    run(store, slot, 0, 150)
    assert [store.restorable(slot, at) for at in (0, 1, 77, 150, 999)] == [0, 1, 77, 150, 150]
    run(store, slot, 150, 450)
    assert [store.restorable(slot, at) for at in (600 - BACK - 1, 600 - BACK, 599)] == [0, 600 - BACK, 599]
    with pytest.raises(NativeError, match="gone back"):
        store.rewind(slot, 600 - BACK - 1)
    with pytest.raises(NativeError, match="gone back"):
        store.begin(batch_of([(slot, 600 - BACK - 1, [0], "none")]))
    store.rewind(slot, 600 - BACK)
    # What was written at 599 is in the ring still, over what lay there before.
    assert store.restorable(slot, 600 - BACK - 1) == 0
    run(store, slot, 600 - BACK, 10)
    store.rewind(slot, 0)
    run(store, slot, 0, 120)
    assert store.restorable(slot, 5) == 5


def test_goes_back_to_copies_and_somewhat_before(store: HybridStore) -> None:
    slot = store.open()
    run(store, slot, 0, 300)
    store.checkpoint(slot)
    run(store, slot, 300, 400)
    last, before = 300, 300 - TAIL_TOKENS
    asked = (before - 1, before, 299, 300, 500, 700 - BACK)
    assert [store.restorable(slot, at) for at in asked] == [0, before, 299, last, last, 700 - BACK]
    for at in (290, before):  # of the first position a whole window, too
        keys, _ = store.export(slot, 0, at)
        np.testing.assert_array_equal(keys[0, :, 0], np.arange(at - 100, at))
    store.rewind(slot, 290)
    run(store, slot, 290, 30)
    assert store.restorable(slot, before) == before
    assert store.restorable(slot, before - 1) == 0
    np.testing.assert_array_equal(store.export(slot, 0, 320)[1][0, :, 0], np.arange(220, 320) / 2)


def test_a_copy_takes_what_is_overwritten_when_it_is(store: HybridStore) -> None:
    """Nothing at first, so that no prompt waits for it; then as many positions as are written; and whatever
    was there is there again, wherever in between the sequence went back to."""
    slot = store.open()
    run(store, slot, 0, 300)
    store.checkpoint(slot)
    (window,) = store._fixed[slot].copies[300].windows.values()
    assert (window.first, window.num_saved) == (300 - TAIL_TOKENS - 100, 0)
    spare = ROWS - 100 - TAIL_TOKENS
    run(store, slot, 300, spare)
    assert window.num_saved == 0
    for count in (5, 20, 60, 300):
        run(store, slot, 300 + spare, count)
        assert min(count, 100 + TAIL_TOKENS) <= window.num_saved <= min(count + 31, 100 + TAIL_TOKENS)
        exported = store.export(slot, 0, 295)[0]
        np.testing.assert_array_equal(exported[0, :, 0], np.arange(195, 295))
        store.rewind(slot, 300)
        run(store, slot, 300, spare)


def test_a_pass_that_broke_off_spoils_what_it_overwrote(store: HybridStore) -> None:
    slot = store.open()
    run(store, slot, 0, 300)
    store.checkpoint(slot)
    run(store, slot, 300, 50)
    store.begin(batch_of([(slot, 350, [0] * BACK, "none")]))
    assert store.restorable(slot, 350) == 350
    store.begin(batch_of([(slot, 350, [0] * (BACK + 1), "none")]))
    assert store.restorable(slot, 350) == 300
    store.checkpoint(slot)  # of nothing
    store.rewind(slot, 300)
    run(store, slot, 300, 50)


def test_keeps_the_first_and_the_newest_copies(store: HybridStore) -> None:
    slot = store.open()
    for start in range(0, 900, 100):
        run(store, slot, start, 100)
        store.checkpoint(slot)
    found = {store.restorable(slot, at) for at in range(100, 900 - BACK, 100)}
    assert found == {100, *range(900 - 100 * (SNAPSHOTS - 2), 900 - BACK, 100)}
    store.rewind(slot, 100)
    run(store, slot, 100, 50)


def test_another_slot_goes_on_from_what_was_exported(store: HybridStore) -> None:
    first, second = store.open(), store.open()
    run(store, first, 0, 400)
    run(store, second, 0, 500)
    layers = [store.export(first, layer, 390) for layer in range(2)]
    assert [keys.shape[1] for keys, _ in layers] == [100, 390]
    for layer, rows in enumerate(layers):
        import_layer(store, second, layer, rows, 390)
    assert [store.restorable(second, at) for at in (300, 388, 389, 390, 500)] == [0, 0, 389, 390, 390]
    run(store, second, 390, 20)
    with pytest.raises(NativeError, match="too few"):
        import_layer(store, second, 0, (layers[0][0][:, 1:], layers[0][1][:, 1:]), 390)
    whole = store.export(first, 1, 390)  # as a file of before has it of every layer
    for layer in range(2):
        import_layer(store, second, layer, whole, 390)
    run(store, second, 390, 20)


def test_a_short_context_is_kept_whole() -> None:
    store = state_store(SPEC, ROWS, "f16")
    assert not store.has_rings
    assert [place.rows for place in store.places if place is not None] == [ROWS, ROWS]
    assert store.slot_bytes == 2 * 2 * ROWS * 32 * 2


@pytest.mark.parametrize(
    ("name", "growing", "fixed"),
    [
        # FAMILIES: bytes a token of layers that keep all, and what a window or state takes beside.
        ("gpt-oss-120b", 18 * 2 * 8 * 64 * 2, 18 * 2 * 8 * 64 * 2 * ring_positions(128)),
        ("gemma-4-26b-a4b", 5 * 2 * 2 * 512 * 2, 25 * 2 * 8 * 256 * 2 * ring_positions(1024)),
        ("deepseek-v3", 61 * 576 * 2, 0),
        ("glm-5", 78 * (576 + 128) * 2, 0),
        ("qwen3-235b-a22b", 94 * 2 * 4 * 128 * 2, 0),
        ("qwen3.5-35b-a3b", 10 * 2 * 2 * 256 * 2, 30 * (32 * 128 * 128 + 3 * 8192) * 4),
    ],
)
def test_the_store_takes_what_the_plan_says(
    name: str, growing: int, fixed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays as large as they are made: their pages cost nothing until they are written."""
    monkeypatch.setattr("krasis.runtime.state.kv_store.available_memory_bytes", lambda: None)
    config = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    spec, capacity = spec_from_hf(config, name), 8192
    store = state_store(spec, capacity, "f16")
    measured = sum(memory.nbytes for memory in store.memory(store.open()))
    planned = sizes_of_shape(spec).kv_bytes(capacity, "f16", "rings")
    by_hand = growing * capacity + fixed
    assert planned == pytest.approx(by_hand, rel=0.01)
    assert measured == pytest.approx(by_hand, rel=0.01)
    copies = sizes_of_shape(spec).snapshot_bytes(capacity, "f16", "rings")
    assert store.slot_bytes == pytest.approx(planned + copies, rel=0.01)


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("qwen3-235b-a22b", 94 * 2 * 4 * (128 + 4)),
        ("gpt-oss-120b", 18 * 2 * 8 * (64 + 4)),
        ("deepseek-v3", 61 * (576 + 2 * 4)),
        ("deepseek-v3.2", 61 * (576 + 2 * 4 + 128 + 4)),
    ],
)
def test_8_bits_take_half(name: str, token_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("krasis.runtime.state.kv_store.available_memory_bytes", lambda: None)
    config = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    spec, capacity = spec_from_hf(config, name), 8192
    narrow, wide = (state_store(spec, capacity, dtype) for dtype in ("int8", "f16"))
    sizes = sizes_of_shape(spec)
    grown = [sizes.kv_bytes(n, "int8", "rings") for n in (1000, 2000)]
    assert grown[1] - grown[0] == 1000 * token_bytes
    measured = sum(memory.nbytes for memory in narrow.memory(narrow.open()))
    assert measured == pytest.approx(sizes.kv_bytes(capacity, "int8", "rings"), rel=0.01)
    assert narrow.slot_bytes <= 0.535 * wide.slot_bytes


@pytest.mark.parametrize("dtype", ["f16", "int8"])
@pytest.mark.parametrize("name", ["gpt-oss-120b", "deepseek-v3", "glm-5", "qwen3.5-35b-a3b"])
def test_what_an_export_takes_is_known_before(name: str, dtype: str) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    spec = spec_from_hf(config, name)
    spec = dataclasses.replace(spec, layers=spec.layers[:4])
    store = state_store(spec, 300, dtype)
    slot = store.open()
    batch = batch_of([(slot, 0, [0] * 250, "none")])
    store.begin(batch)
    store.advance(batch.spans)
    layers = [store.export(slot, layer, 250) for layer in range(4)]
    assert store.exported_bytes(250) == sum(keys.nbytes + values.nbytes for keys, values in layers)


def test_whatever_is_done_what_is_seen_is_right() -> None:
    """Random turns, broken passes and returns, of layers with several windows; each token has a value of its
    own, so that one of another branch is told apart."""
    mixers = [dataclasses.replace(FULL, window=window) for window in (30, 100)]
    spec = dataclasses.replace(SPEC, layers=tuple(Layer(mixer, EXPERTS) for mixer in (*mixers, FULL)))
    random = np.random.default_rng(3)
    for _ in range(12):
        store = state_store(spec, 700, "f32", 2)
        slot, other = store.open(), store.open()
        values: list[float] = []
        for _ in range(60):
            action = random.integers(0, 5)
            if action == 0:
                store.checkpoint(slot)
            if action == 1:
                at = store.restorable(slot, int(random.integers(0, len(values) + 1)))
                store.rewind(slot, at)
                del values[at:]
            if action == 2 and values:
                at = store.restorable(slot, int(random.integers(0, len(values) + 1)))
                for layer in range(3):
                    rows = store.export(slot, layer, at)
                    np.testing.assert_array_equal(rows[0][0, :, 0], values[at - rows[0].shape[1] : at])
                    import_layer(store, other, layer, rows, at)
            count = int(random.choice([1, 7, 60]))
            start = store.restorable(slot, len(values))
            del values[start:]
            if len(values) + count > 700:
                continue
            batch = batch_of([(slot, start, [0] * count, "none")])
            store.begin(batch)
            fresh = random.random(count).astype(np.float32)
            seen_by = [*values, *fresh]
            rows = np.broadcast_to(fresh[None, :, None], (1, count, 32))
            for layer in range(3):
                keys, _, first = store.extend(slot, layer, start, rows, rows)
                np.testing.assert_array_equal(keys[0, :, 0], np.float32(seen_by[first:]))
            if action != 4:  # else the pass breaks off behind the last layer
                store.advance(batch.spans)
                values = seen_by
