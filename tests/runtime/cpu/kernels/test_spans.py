"""Several sequences in one call: each gets the bits of a call of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from sequences import attention64, cache_of

from krasis.formats.errors import NativeError
from krasis.runtime.batch import Span
from krasis.runtime.cpu.heads import Heads, QkNorms, Rotation
from krasis.runtime.cpu.kernels import attention_workspace_bytes, workspace
from krasis.runtime.cpu.spans import LayerCache, SlotMemory, Spans

HEADS, CAPACITY, LAYERS = Heads(8, 2, 32), 1300, 2
# (slot, start, rows): decode at the ends of blocks, splits and windows, short and long pieces of prompts.
MIXES = {
    "one": [(0, 900, 1)],
    "decode": [(2, 1299, 1), (0, 0, 1), (1, 255, 1), (3, 256, 1), (4, 700, 1)],
    "few rows": [(1, 1000, 4), (0, 510, 3), (3, 63, 2), (2, 0, 4)],
    "prompts": [(0, 0, 70), (3, 600, 1), (1, 200, 130), (2, 1200, 1), (4, 0, 5)],
    "many": [(slot, 18 * slot, 1) for slot in range(70)],
}


@dataclass
class Sequences:
    """Slots of LAYERS layers each; the second layer is used. qkv: rows of a call."""

    rng: np.random.Generator
    kv_dtype: type
    num_slots: int

    def __post_init__(self) -> None:
        shape = (LAYERS, HEADS.num_kv_heads, CAPACITY, HEADS.head_dim)
        one = self.rng.standard_normal((2, *shape), dtype=np.float32)
        self.arrays = [
            [(part / (1 + slot)).astype(self.kv_dtype) for part in one] for slot in range(self.num_slots)
        ]
        self.slots = [SlotMemory(*pair) for pair in self.arrays]
        keys = self.slots[0].keys
        self.cache = LayerCache(keys[0].nbytes, keys[0].nbytes, CAPACITY, cache_of(keys[0]).dtype)

    def spans(self, mix, max_spans=None):
        keys = self.slots[0].keys
        spans = Spans(max_spans or len(mix), keys.nbytes, keys.nbytes)
        spans.set(parts(mix), self.slots)
        return spans


def parts(mix):
    row, found = 0, []
    for slot, start, rows in mix:
        found.append(Span(slot, row, rows, start))
        row += rows
    return found


def attend(kernels, sequences, mix, q, scratch_bytes=None, **rule):
    out = np.full((len(q), HEADS.attention_size), np.nan, np.float32)
    end = max(start + rows for _, start, rows in mix)
    scratch = workspace(scratch_bytes or attention_workspace_bytes(len(q), end, HEADS))
    kernels.attention(q, HEADS, sequences.spans(mix), sequences.cache, 0.2, out, scratch, **rule)
    return out


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rule", [{}, {"window": 100}, {"sinks": np.linspace(-3, 9, 8, dtype=np.float32)}])
def test_attention_gives_each_its_own_bits(make_kernels, isa, rng, name, kv_dtype, rule):
    mix = MIXES[name]
    sequences = Sequences(rng, kv_dtype, 1 + max(slot for slot, _, _ in mix))
    q = rng.standard_normal((sum(rows for _, _, rows in mix), HEADS.attention_size)).astype(np.float32) * 3
    together = attend(make_kernels(isa, 3), sequences, mix, q, **rule)
    plenty = attend(make_kernels(isa, 1), sequences, mix, q, 1 << 24, **rule)
    assert plenty.tobytes() == together.tobytes()
    row = 0
    for slot, start, rows in mix:
        own = attend(make_kernels("avx2", 1), sequences, [(slot, start, rows)], q[row : row + rows], **rule)
        assert own.tobytes() == together[row : row + rows].tobytes(), (slot, start)
        row += rows


@pytest.mark.parametrize("name", ["decode", "few rows", "prompts"])
@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 256, 300, 5000])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_equals_float64(kernels, rng, name, window, has_sinks):
    mix = MIXES[name]
    sequences = Sequences(rng, np.float32, 5)
    q = rng.standard_normal((sum(rows for _, _, rows in mix), HEADS.attention_size)).astype(np.float32)
    sinks = (rng.standard_normal(HEADS.num_heads) * 4).astype(np.float32) if has_sinks else None
    out = attend(kernels, sequences, mix, q, window=window, sinks=sinks)
    row = 0
    for slot, start, rows in mix:
        keys, values = (array[1] for array in sequences.arrays[slot])
        own = q[row : row + rows].reshape(rows, HEADS.num_heads, HEADS.head_dim)
        want = attention64(own, keys, values, start, 0.2, window, sinks)
        np.testing.assert_allclose(out[row : row + rows], want, rtol=1e-4, atol=1e-5)
        row += rows


@pytest.mark.parametrize("window", [64, 100, 200])
def test_a_ring_gives_the_bits_of_a_whole_cache(make_kernels, isa, rng, window):
    """What is no longer seen is NaN in it."""
    mix, ring = MIXES["decode"] + [(5, 600, 120), (6, 0, 90)], 320
    sequences = Sequences(rng, np.float16, 7)
    q = rng.standard_normal((sum(rows for _, _, rows in mix), HEADS.attention_size)).astype(np.float32)
    whole = attend(make_kernels(isa, 2), sequences, mix, q, window=window)
    slots = []
    for (_, start, rows), pair in ((one, sequences.arrays[one[0]]) for one in sorted(mix)):
        seen = np.arange(max(0, start - window + 1), start + rows)
        rings = [np.full((HEADS.num_kv_heads, ring, HEADS.head_dim), np.nan, np.float16) for _ in pair]
        for to, part in zip(rings, pair, strict=True):
            to[:, seen % ring] = part[1][:, seen]
        slots.append(SlotMemory(*rings))
    size = slots[0].keys.nbytes
    spans, out = Spans(len(mix), size, size), np.empty_like(whole)
    spans.set(parts(mix), slots)
    cache, scratch = LayerCache(0, 0, ring, "f16", is_ring=True), workspace(1 << 20)
    make_kernels(isa, 3).attention(q, HEADS, spans, cache, 0.2, out, scratch, window=window)
    assert out.tobytes() == whole.tobytes()


@pytest.mark.parametrize("window", [1, 64, 100, 256, 300])
def test_a_window_has_the_same_bits_for_any_chunking(make_kernels, isa, rng, window):
    """Blocks that some rows of a task see and others do not; keys far behind a window are never read."""
    sequences = Sequences(rng, np.float16, 1)
    q = rng.standard_normal((1200, HEADS.attention_size)).astype(np.float32)
    whole = attend(make_kernels("avx2", 2), sequences, [(0, 0, 1200)], q, window=window)
    start = 0
    for rows in (1, 2, 3, 4, 5, 250, 64, 65, 200, 300):
        own = attend(
            make_kernels(isa, 2), sequences, [(0, start, rows)], q[start : start + rows], window=window
        )
        assert own.tobytes() == whole[start : start + rows].tobytes(), start
        start += rows
    for array in sequences.arrays[0]:
        array[1, :, : 1199 - window - 64] = np.nan
    last = attend(make_kernels(isa, 2), sequences, [(0, 1199, 1)], q[1199:], window=window)
    assert last.tobytes() == whole[1199:].tobytes()


def test_a_huge_sink_takes_everything(kernels, rng):
    sequences = Sequences(rng, np.float32, 1)
    q = rng.standard_normal((1, HEADS.attention_size)).astype(np.float32)
    sinks = np.full(HEADS.num_heads, -np.inf, np.float32)
    plain = attend(kernels, sequences, [(0, 500, 1)], q)
    np.testing.assert_allclose(attend(kernels, sequences, [(0, 500, 1)], q, sinks=sinks), plain, rtol=1e-6)
    sinks[:] = 1e30
    assert (attend(kernels, sequences, [(0, 500, 1)], q, sinks=sinks) == 0).all()


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
def test_rope_gives_each_its_own_bits(make_kernels, isa, rng, name, kv_dtype):
    mix = MIXES[name]
    num_slots = 1 + max(slot for slot, _, _ in mix)
    together, alone = (Sequences(np.random.default_rng(3), kv_dtype, num_slots) for _ in range(2))
    qkv = rng.standard_normal((sum(rows for _, _, rows in mix), HEADS.qkv_size)).astype(np.float32)
    angles = rng.uniform(0, 6, (CAPACITY, 16))
    rotation = Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    norms = QkNorms(*rng.uniform(0.5, 2, (2, 32)).astype(np.float32), 1e-6)

    def store(kernels, sequences, mix, rows):
        spans = sequences.spans(mix, len(mix) + 3)
        kernels.qk_norm_rope_store(rows, HEADS, spans, sequences.cache, rotation, norms)

    whole = qkv.copy()
    store(make_kernels(isa, 3), together, mix, whole)
    row = 0
    for part in mix:
        own = qkv[row : row + part[2]].copy()
        store(make_kernels("avx2", 1), alone, [part], own)
        assert own.tobytes() == whole[row : row + part[2]].tobytes()
        row += part[2]
    for one, other in zip(together.arrays, alone.arrays, strict=True):
        assert one[0].tobytes() == other[0].tobytes()
        assert one[1].tobytes() == other[1].tobytes()
    untouched = Sequences(np.random.default_rng(3), kv_dtype, num_slots)
    for one, before in zip(together.arrays, untouched.arrays, strict=True):
        assert (one[0][0] == before[0][0]).all()
        assert (one[1][0] == before[1][0]).all()


def small_spans(max_spans=2, num_bytes=64):
    return Spans(max_spans, num_bytes, num_bytes)


def memory(num_bytes=64):
    return SlotMemory(np.zeros(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8))


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [Span(0, 0, 1, 0), Span(1, 1, 1, 0), Span(2, 2, 1, 0)],
        [Span(0, 1, 1, 0)],
        [Span(0, 0, 0, 0)],
        [Span(0, 0, 1, -1)],
        [Span(0, 0, 2, 0), Span(1, 1, 1, 0)],
        [Span(0, 0, 1, 0), Span(0, 1, 1, 1)],
        [Span(3, 0, 1, 0)],
    ],
)
def test_spans_refuse(spans):
    slots = [memory(), memory(), memory(), memory(63)]
    table = small_spans()
    table.set([Span(1, 0, 1, 5)], slots)
    before = bytes(table._array)
    with pytest.raises(NativeError, match=r"span|slot"):
        table.set(spans, slots)
    assert bytes(table._array) == before


def test_an_empty_table_is_not_set_to_nothing():
    with pytest.raises(NativeError, match="no spans"):
        small_spans().set([], [])


def test_a_table_holds_what_was_set_last():
    """Positions alone change between tokens; then a sequence goes, and another takes its memory."""
    slots, table = [memory(), memory()], small_spans()
    for spans in (
        [Span(0, 0, 1, 5), Span(1, 1, 1, 0)],
        [Span(0, 0, 1, 6), Span(1, 1, 1, 1)],
        [Span(1, 0, 2, 2)],
        [Span(1, 0, 1, 4)],
        [Span(1, 0, 1, 5), Span(0, 1, 1, 7)],
    ):
        table.set(spans, slots)
        found = [(r.first_row, r.rows, r.start, r.keys, r.values) for r in table._array if r.rows]
        assert found == [
            (s.first_row, s.rows, s.start, slots[s.slot].keys_address, slots[s.slot].values_address)
            for s in spans
        ]
        with pytest.raises(NativeError, match="in order"):
            table.set([Span(spans[0].slot, 0, 1, -1)], slots)


def test_spans_want_memory_they_can_write_to():
    array = np.zeros(64, np.uint8)
    array.flags.writeable = False
    with pytest.raises(NativeError, match="read-only"):
        SlotMemory(np.zeros(64, np.uint8), array)
    with pytest.raises(NativeError, match="contiguous"):
        SlotMemory(np.zeros((8, 8), np.uint8)[:, :4], np.zeros(64, np.uint8))
    with pytest.raises(NativeError, match="too few"):
        small_spans(0)
