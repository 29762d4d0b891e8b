"""The kernels of an index over tokens against float64, and their bits on any threads and instructions."""

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
from krasis.runtime.cpu.index_reference import best_positions, index_scores, layer_norm
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
