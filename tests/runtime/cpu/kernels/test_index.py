"""The kernels of an index over tokens or pools against float64; their bits on any threads, instructions."""

from __future__ import annotations

import numpy as np
import pytest
from sequences import attention64

from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.models.rope import Rope
from krasis.formats.models.selection import INDEX_NORM_EPS, Selection
from krasis.runtime import reference
from krasis.runtime.batch import Span
from krasis.runtime.cpu.heads import Heads, Rotation
from krasis.runtime.cpu.index_kernels import (
    IndexNorm,
    attention_chosen,
    choose,
    choose_workspace_bytes,
    chosen_workspace_bytes,
    index_store,
)
from krasis.runtime.cpu.index_reference import (
    best_pools,
    best_positions,
    index_scores,
    layer_norm,
    pool_keys,
)
from krasis.runtime.cpu.kernels import attention_workspace_bytes, workspace
from krasis.runtime.cpu.rope import rope_tables
from krasis.runtime.cpu.spans import LayerCache, SlotMemory, Spans
from krasis.runtime.state.row_form import RowForm

NAMES = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(np.uint8): "int8"}
PARTS = ((1, 699), (70, 0), (3, 96), (20, 190))  # rows and start of each sequence


def spans_of(parts, keys, values):
    """The spans of sequences whose latents and index keys are given, each [1, capacity, width]."""
    spans = Spans(len(parts), keys[0].nbytes, values[0].nbytes)
    found, row = [], 0
    for slot, (rows, start) in enumerate(parts):
        found.append(Span(slot, row, rows, start))
        row += rows
    spans.set(found, [SlotMemory(*both) for both in zip(keys, values, strict=True)])
    return spans


def place(parts, keys, values):
    return spans_of(parts, keys, values), LayerCache(0, 0, keys[0].shape[1], NAMES[keys[0].dtype])


def nothing(caches):
    return [np.zeros((1, cache.shape[1], 0), cache.dtype) for cache in caches]


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
def test_keys_are_normed_and_turned_as_in_float64(kernels, rng, style, kv_dtype):
    index = Selection("tokens", 3, 64, 8, rope=Rope(32, 1e4, style))
    form, parts = RowForm((64,), kv_dtype), ((5, 3), (1, 60))
    values = [np.zeros((1, 70, form.width), form.numpy) for _ in parts]
    k, q = (rng.standard_normal((6, n)).astype(np.float32) for n in (64, 192))
    norm = IndexNorm(*rng.standard_normal((2, 64)).astype(np.float32))
    cos, sin = rope_tables(index.rope, 70)
    before, positions = q.copy(), np.array([3, 4, 5, 6, 7, 60])
    index_store(kernels, k, q, index, norm, Rotation(cos, sin, style), *place(parts, nothing(values), values))
    own = layer_norm(k.astype(np.float64), norm.weight, norm.bias, INDEX_NORM_EPS)[:, None]
    turned = [
        reference.rotate(x, cos[positions], sin[positions], index.rope)
        for x in (own, before.astype(np.float64).reshape(6, 3, 64))
    ]
    kept = np.concatenate([form.floats(values[0][0, 3:8]), form.floats(values[1][0, 60:61])])
    tolerance = {"f32": 3e-6, "f16": 2e-3, "int8": 4e-2}[kv_dtype]
    np.testing.assert_allclose(kept, turned[0][:, 0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(q.reshape(6, 3, 64), turned[1], rtol=3e-6, atol=3e-6)
    assert not values[0][0, 8:].any()


class Chosen:
    """Queries and keys of some sequences, and what ``choose`` makes of them."""

    def __init__(self, rng, heads, dim, budget, kv_dtype="f32"):
        self.index, self.form = Selection("tokens", heads, dim, budget), RowForm((dim,), kv_dtype)
        self.values = [self.form.kept(rng.standard_normal((1, 704, dim)).astype(np.float32)) for _ in PARTS]
        tokens = sum(rows for rows, _ in PARTS)
        self.q = rng.standard_normal((tokens, heads * dim)).astype(np.float32)
        self.weights = rng.standard_normal((tokens, heads)).astype(np.float32)

    def run(self, kernels, parts=PARTS, first=0):
        """chosen [T, budget] of the rows from ``first`` on; -1 where nothing was written."""
        tokens = sum(rows for rows, _ in parts)
        slots = [PARTS.index(part) for part in parts]
        values = [self.values[slot] for slot in slots]
        own = slice(first, first + tokens)
        out = np.full((tokens, self.index.budget), -1, np.int32)
        scratch = workspace(choose_workspace_bytes(tokens, max(rows + start for rows, start in parts)))
        spans, cache = place(parts, nothing(values), values)
        choose(kernels, self.q[own], self.weights[own], self.index, spans, cache, out, scratch)
        return out


def expected_choice(found, index):
    """[T, budget] in float64, -1 where a row sees fewer."""
    rows = []
    first = 0
    for values, (count, start) in zip(found.values, PARTS, strict=True):
        q = found.q[first : first + count].astype(np.float64).reshape(count, index.heads, index.dim)
        keys = found.form.floats(values[0, : start + count]).astype(np.float64)
        scores = index_scores(q, found.weights[first : first + count].astype(np.float64), keys)
        for picked in best_positions(scores, start, index.budget):
            own = np.flatnonzero(picked)
            rows.append(np.pad(own, (0, index.budget - len(own)), constant_values=-1))
        first += count
    return np.array(rows)


@pytest.mark.parametrize(("heads", "dim", "kv_dtype"), [(5, 48, "f32"), (40, 128, "f16"), (64, 128, "int8")])
def test_the_best_are_chosen(make_kernels, isa, rng, heads, dim, kv_dtype):
    found = Chosen(rng, heads, dim, 100, kv_dtype)
    chosen = found.run(make_kernels(isa, 2))
    np.testing.assert_array_equal(chosen, expected_choice(found, found.index))
    assert chosen.tobytes() == found.run(make_kernels("avx2", 1)).tobytes()
    alone = found.run(make_kernels(isa, 2), PARTS[3:], first=74)
    assert alone.tobytes() == chosen[74:].tobytes()


def test_of_equals_the_first_are_chosen_whatever_the_numbers(kernels, rng):
    """Zeros of either sign are equal, and what is no number breaks nothing."""
    found = Chosen(rng, 3, 16, 60)
    found.weights[:] = -np.abs(found.weights)
    for values in found.values:
        values[:, ::2] = 0
    np.testing.assert_array_equal(found.run(kernels), expected_choice(found, found.index))
    found.values[0][:, 5] = np.nan
    found.weights[:] = np.inf
    chosen = found.run(kernels)[0]
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < 700


POOLED = {"f32": 3e-6, "f16": 2e-3, "int8": 4e-2}


class Pooled:
    """Keys and gates of sequences in pools, stored in calls of so many rows each."""

    def __init__(self, rng, block, dim, kv_dtype, rows=70):
        self.index = Selection("pools", 5, dim, 5 * block, block=block)
        self.form, self.rows = RowForm((dim, dim), kv_dtype), rows
        self.k, self.gates = (rng.standard_normal((rows, dim)).astype(np.float32) for _ in range(2))
        self.gates *= 3
        vectors = rng.standard_normal((2 + block, dim)).astype(np.float32)
        self.norm = IndexNorm(vectors[0], vectors[1], vectors[2:].copy())

    def stored(self, kernels, step):
        """[rows, width] of one sequence."""
        values = np.zeros((1, 80, self.form.width), self.form.numpy)
        for begin in range(0, self.rows, step):
            own = slice(begin, min(begin + step, self.rows))
            parts = ((own.stop - begin, begin),)
            spans, cache = place(parts, nothing([values]), [values])
            k, gates = self.k[own].copy(), self.gates[own].copy()
            index_store(kernels, k, None, self.index, self.norm, None, spans, cache, gates)
        return values

    def expected(self):
        """Keys of whole pools in float64, of keys and gates as they are kept."""
        whole, norm = self.rows // self.index.block * self.index.block, self.norm
        own = layer_norm(self.k.astype(np.float64), norm.weight, norm.bias, INDEX_NORM_EPS)
        both = np.concatenate([own, self.gates], axis=1).astype(np.float32)
        kept = self.form.floats(self.form.kept(both))[:whole].astype(np.float64)
        dim = self.index.dim
        return own, pool_keys(kept[:, :dim], kept[:, dim:], self.norm.positions.astype(np.float64))


@pytest.mark.parametrize("kv_dtype", POOLED)
@pytest.mark.parametrize(("block", "dim"), [(4, 64), (16, 48), (3, 16)])
def test_pools_are_kept_in_place_of_their_last_tokens(make_kernels, isa, rng, block, dim, kv_dtype):
    found = Pooled(rng, block, dim, kv_dtype)
    values = found.stored(make_kernels(isa, 2), found.rows)
    for threads, step, name in ((1, 1, isa), (3, 5, isa), (1, 70, "avx2")):
        np.testing.assert_array_equal(found.stored(make_kernels(name, threads), step), values)
    kept, tolerance = found.form.floats(values[0])[: found.rows], POOLED[kv_dtype]
    keys, pools = found.expected()
    is_last = np.arange(found.rows) % block == block - 1
    np.testing.assert_allclose(kept[is_last, :dim], pools, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(kept[~is_last, :dim], keys[~is_last], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        kept[~is_last, dim:], found.gates[~is_last], rtol=tolerance, atol=tolerance * 3
    )
    assert np.abs(pools).max() > 0.5  # of numbers near 0 nothing would be shown


@pytest.mark.parametrize("kv_dtype", POOLED)
@pytest.mark.parametrize("block", [4, 16])
def test_the_best_pools_are_chosen_and_the_tail(make_kernels, isa, rng, block, kv_dtype):
    index, form = Selection("pools", 9, 48, 6 * block, block=block), RowForm((48, 48), kv_dtype)
    values = [form.kept(rng.standard_normal((1, 704, 96)).astype(np.float32)) for _ in PARTS]
    tokens = sum(rows for rows, _ in PARTS)
    q = rng.standard_normal((tokens, 9 * 48)).astype(np.float32)
    weights = rng.standard_normal((tokens, 9)).astype(np.float32)
    expected, row = [], 0
    for slot, (rows, start) in enumerate(PARTS):
        ends = slice(block - 1, (start + rows) // block * block, block)
        keys = form.floats(values[slot][0])[ends, :48].astype(np.float64)
        own = slice(row, row + rows)
        scores = index_scores(
            q[own].astype(np.float64).reshape(rows, 9, 48), weights[own].astype(np.float64), keys
        )
        for picked in best_pools(scores, start, start + rows, index.budget, block):
            places = np.flatnonzero(picked)
            expected.append(np.pad(places, (0, index.most_keys - len(places)), constant_values=-1))
        row += rows
    out = np.full((2, tokens, index.most_keys), -1, np.int32)
    for number, kernels in enumerate((make_kernels(isa, 2), make_kernels("avx2", 1))):
        scratch = workspace(choose_workspace_bytes(tokens, 700))
        spans, cache = place(PARTS, nothing(values), values)
        choose(kernels, q.copy(), weights, index, spans, cache, out[number], scratch)
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(out[0], expected)
    assert (out[0] == -1).any()  # rows that see little


def test_attention_reads_pools_and_their_tail(kernels, rng):
    heads, block, budget = Heads(4, 1, 128, 96), 4, 40
    form, width = RowForm((96, 32), "f32"), budget + block - 1
    caches = [form.kept(rng.standard_normal((1, 704, 128)).astype(np.float32)) for _ in PARTS]
    positions = np.concatenate([np.arange(start, start + rows) for rows, start in PARTS])
    tokens = len(positions)
    q = rng.standard_normal((tokens, heads.attention_size)).astype(np.float32)
    chosen, counts = np.zeros((tokens, width), np.int32), []
    for row, position in enumerate(positions):
        pools, tail = divmod(position + 1, block)
        taken = np.sort(rng.choice(pools, min(pools, budget // block), replace=False))
        places = np.concatenate([np.repeat(taken * block, block) + np.tile(np.arange(block), len(taken))])
        places = np.concatenate([places, pools * block + np.arange(tail)])
        chosen[row, : len(places)] = places
        counts.append(len(places))
    out = np.full((tokens, heads.output_size), np.nan, np.float32)
    scratch = workspace(chosen_workspace_bytes(tokens, width, heads, "f32"))
    placed = place(PARTS, caches, nothing(caches))
    attention_chosen(kernels, q, heads, *placed, 0.07, chosen, out, scratch, block)
    first = 0
    for slot, (rows, _) in enumerate(PARTS):
        for row in range(first, first + rows, 7):
            keys = caches[slot][:, chosen[row, : counts[row]]]
            expected = attention64(
                q[row : row + 1].reshape(1, 4, 128), keys, keys[..., :96], counts[row] - 1, 0.07
            )
            np.testing.assert_allclose(out[row : row + 1], expected, rtol=1e-4, atol=2e-5)
        first += rows


@pytest.mark.parametrize("kv_dtype", ["f32", "int8"])
def test_attention_reads_what_was_chosen_alone(make_kernels, isa, rng, kv_dtype):
    heads, budget, form = Heads(36, 1, 128, 96), 300, RowForm((96, 32), kv_dtype)
    caches = [form.kept(rng.standard_normal((1, 704, 128)).astype(np.float32)) for _ in PARTS]
    tokens = sum(rows for rows, _ in PARTS)
    q = rng.standard_normal((tokens, heads.attention_size)).astype(np.float32)
    positions = np.concatenate([np.arange(start, start + rows) for rows, start in PARTS])
    chosen = np.zeros((tokens, budget), np.int32)
    for row, position in enumerate(positions):
        count = min(budget, position + 1)
        chosen[row, :count] = np.sort(rng.choice(position + 1, count, replace=False))
    kernels, other = make_kernels(isa, 2), make_kernels("avx2", 1)

    def attended(own, num_rows):
        out = np.full((tokens, heads.output_size), np.nan, np.float32)
        scratch = workspace(chosen_workspace_bytes(num_rows, budget, heads, kv_dtype))
        placed = place(PARTS, caches, nothing(caches))
        attention_chosen(own, q, heads, *placed, 0.07, chosen, out, scratch)
        return out

    found = attended(kernels, tokens)
    assert found.tobytes() == attended(other, 1).tobytes()
    whole = np.full_like(found, np.nan)
    scratch = workspace(attention_workspace_bytes(tokens, 704, heads))
    kernels.attention(q, heads, *place(PARTS, caches, nothing(caches)), 0.07, whole, scratch)
    is_all = positions < budget
    assert found[is_all].tobytes() == whole[is_all].tobytes()
    keys = form.floats(caches[0])[:, chosen[0]]
    expected = attention64(q[:1].reshape(1, 36, 128), keys, keys[..., :96], budget - 1, 0.07)
    np.testing.assert_allclose(found[:1], expected, rtol=1e-4, atol=2e-5)


def test_what_does_not_fit_is_refused(kernels, rng):
    found = Chosen(rng, 3, 16, 60)
    spans, cache = place(PARTS, nothing(found.values), found.values)
    out = np.zeros((94, 60), np.int32)
    with pytest.raises(ResourceError):
        choose(kernels, found.q, found.weights, found.index, spans, cache, out, workspace(700 * 4 - 64))
    large = LayerCache(0, 64, 704, "f32")
    with pytest.raises(NativeError, match="end outside"):
        choose(kernels, found.q, found.weights, found.index, spans, large, out, workspace(1 << 20))
    heads, form = Heads(3, 1, 128, 96), RowForm((96, 32), "f32")
    caches = [np.zeros((1, 704, 128), form.numpy) for _ in PARTS]
    q, to = np.zeros((94, 384), np.float32), np.zeros((94, 288), np.float32)
    placed = place(PARTS, caches, nothing(caches))
    scratch = workspace(chosen_workspace_bytes(94, 60, heads, "f32"))
    for wrong in (-1, 700):
        out[0, 7] = wrong
        with pytest.raises(NativeError):
            attention_chosen(kernels, q, heads, *placed, 1.0, out, to, scratch)
