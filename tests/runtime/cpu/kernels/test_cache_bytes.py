"""Keys and values in 8 bits: codes and scales as NumPy makes them, and attention with the bits that it has
over what they stand for in floats."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.rope import Rope
from krasis.runtime.batch import Span
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.heads import Heads, QkNorms, Rotation
from krasis.runtime.cpu.kernels import attention_workspace_bytes, workspace
from krasis.runtime.cpu.latent_kernels import latent_store
from krasis.runtime.cpu.spans import LayerCache, SlotMemory, Spans
from krasis.runtime.state.row_form import RowForm

PARTS = ((0, 300, 1), (1, 0, 37), (2, 255, 3))  # slot, start, rows
CAPACITY = 320
LATENT = LatentAttention(3, None, 64, 32, 32, 48, Rope(32, 1e4), 0.1)


def memories(width: int, dtype: str, heads: int) -> list[np.ndarray]:
    shape = (heads, CAPACITY, width)
    kind = np.uint8 if dtype == "int8" else np.float32
    return [np.zeros(shape, kind) for _ in PARTS]


def spans_of(keys: list[np.ndarray], values: list[np.ndarray]) -> Spans:
    found = Spans(len(PARTS), keys[0].nbytes, values[0].nbytes)
    row, spans = 0, []
    for slot, start, rows in PARTS:
        spans.append(Span(slot, row, rows, start))
        row += rows
    found.set(spans, [SlotMemory(*pair) for pair in zip(keys, values, strict=True)])
    return found


NUM_ROWS = sum(rows for _, _, rows in PARTS)


class Case:
    """The same rows through norm, rotation and store, in floats and in bytes."""

    def __init__(self, rng: np.random.Generator, heads: Heads, norm: str | None, clip: float | None) -> None:
        dim = heads.head_dim
        self.heads, self.clip, self.form = heads, clip, RowForm((dim,), "int8")
        self.qkv = rng.standard_normal((NUM_ROWS, heads.qkv_size)).astype(np.float32)
        self.qkv[1] = 0  # a scale of zero
        self.rotation = Rotation(*rng.standard_normal((2, CAPACITY, dim // 2)).astype(np.float32), "half")
        self.norms = None
        if norm is not None:
            self.norms = QkNorms(*rng.standard_normal((2, dim)).astype(np.float32), 1e-6, norm)
        self.value_norm = heads.shared_kv

    def stored(self, kernels, dtype: str) -> SimpleNamespace:
        heads = self.heads
        width = self.form.width if dtype == "int8" else heads.head_dim
        keys, values = (memories(width, dtype, heads.num_kv_heads) for _ in range(2))
        spans, cache, qkv = spans_of(keys, values), LayerCache(0, 0, CAPACITY, dtype), self.qkv.copy()
        kernels.qk_norm_rope_store(
            qkv, heads, spans, cache, self.rotation, self.norms, None, self.clip, self.value_norm
        )
        return SimpleNamespace(keys=keys, values=values, q=qkv, cache=cache, spans=spans)

    def attended(self, kernels, stored: SimpleNamespace, **rule) -> np.ndarray:
        heads = self.heads
        out = np.empty((NUM_ROWS, heads.output_size), np.float32)
        scratch = workspace(attention_workspace_bytes(NUM_ROWS, CAPACITY, heads))
        kernels.attention(stored.q, heads, stored.spans, stored.cache, 0.2, out, scratch, **rule)
        return out


CASES = {
    "plain": (Heads(4, 2, 32), None, None),
    "normed and clipped": (Heads(8, 1, 48), "head", 1.5),
    "normed behind the rotation": (Heads(2, 2, 128), "head_after_rope", None),
    "values that are keys": (Heads(2, 1, 512, shared_kv=True), "head", None),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_of_numpy_and_attention_has_the_bits_of_floats(make_kernels, isa, rng, name):
    case = Case(rng, *CASES[name])
    kernels = make_kernels(isa, 2)
    floats, codes = case.stored(kernels, "f32"), case.stored(kernels, "int8")
    for wide, narrow in zip(floats.keys + floats.values, codes.keys + codes.values, strict=True):
        np.testing.assert_array_equal(narrow, case.form.kept(wide))
        wide[...] = case.form.floats(narrow)
    size = case.heads.attention_size
    np.testing.assert_array_equal(codes.q[:, :size], floats.q[:, :size])
    for rule in ({}, {"window": 40}):
        expected = case.attended(kernels, floats, **rule)
        assert case.attended(kernels, codes, **rule).tobytes() == expected.tobytes()


def test_latents_have_a_scale_beside_that_of_the_common_part(make_kernels, isa, rng):
    """Which is a thousand times as large here."""
    mixer, kernels = LATENT, make_kernels(isa, 2)
    width = mixer.kv_rank + mixer.rope_dim
    form = RowForm((mixer.kv_rank, mixer.rope_dim), "int8")
    q = rng.standard_normal((NUM_ROWS, mixer.heads * (mixer.nope_dim + mixer.rope_dim))).astype(np.float32)
    kv = rng.standard_normal((NUM_ROWS, width)).astype(np.float32)
    kv[:, mixer.kv_rank :] *= 1000
    norm = rng.standard_normal(mixer.kv_rank).astype(np.float32)
    rotation = Rotation(*rng.standard_normal((2, CAPACITY, mixer.rope_dim // 2)).astype(np.float32), "half")
    heads = Heads(mixer.heads, 1, width, mixer.kv_rank)
    queries = np.zeros((NUM_ROWS, mixer.heads * width), np.float32)
    found = []
    for dtype in ("f32", "int8"):
        keys = memories(form.width if dtype == "int8" else width, dtype, 1)
        spans, cache = (
            spans_of(keys, [np.zeros(1, np.uint8) for _ in PARTS]),
            LayerCache(0, 0, CAPACITY, dtype),
        )
        acts = Acts.allocate(NUM_ROWS * mixer.heads, mixer.nope_dim)
        latent_store(kernels, q, kv, mixer, norm, rotation, spans, cache, acts, queries)
        found.append((keys, spans, cache))
    for wide, narrow in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_array_equal(narrow, form.kept(wide))
        assert np.abs(form.floats(narrow) - wide)[..., : mixer.kv_rank].max() < 0.05
        wide[...] = form.floats(narrow)
    queries = rng.standard_normal(queries.shape).astype(np.float32)
    outs = []
    for _, spans, cache in found:
        out = np.empty((NUM_ROWS, heads.output_size), np.float32)
        scratch = workspace(attention_workspace_bytes(NUM_ROWS, CAPACITY, heads))
        kernels.attention(queries, heads, spans, cache, 0.07, out, scratch)
        outs.append(out.tobytes())
    assert outs[0] == outs[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_none_afterwards(make_kernels, isa, rng, value):
    case = Case(rng, Heads(2, 1, 32), None, None)
    case.qkv[-1, 70] = value
    stored = case.stored(make_kernels(isa, 1), "int8")
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(case.form.floats(stored.keys[2])[0, 257]).all()
    assert not np.isfinite(case.attended(make_kernels(isa, 1), stored)[-1]).any()


def test_forms_of_rows(rng):
    form = RowForm((48, 16), "int8")
    x = rng.standard_normal((2, 5, 64)).astype(np.float32)
    x[..., 48:] *= 100
    kept = form.kept(x)
    assert (kept.shape, form.width, form.num_bytes) == ((2, 5, 72), 72, 72)
    error = np.abs(form.floats(kept) - x)
    assert (error[..., :48] <= np.abs(x[..., :48]).max(axis=-1, keepdims=True) / 253).all()
    assert (error[..., 48:] <= np.abs(x[..., 48:]).max(axis=-1, keepdims=True) / 253).all()
    assert RowForm((), "int8").kept(x[..., :0]).shape == (2, 5, 0)
    assert RowForm((64,), "f16").num_bytes == 128
