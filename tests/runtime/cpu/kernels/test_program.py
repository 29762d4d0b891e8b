"""Calls that are kept: the same bits as calls made at once, at other positions, and errors that are named."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.runtime.batch import Span
from krasis.runtime.cpu.heads import Heads, QkNorms, Rotation
from krasis.runtime.cpu.kernels import (
    Acts,
    Kernels,
    attention_workspace_bytes,
    moe_workspace_bytes,
    workspace,
)
from krasis.runtime.cpu.program import Call, Program
from krasis.runtime.cpu.spans import LayerCache, SlotMemory, Spans

HEADS, CAPACITY = Heads(4, 2, 32), 600


class Layer:
    """Two rows through norm, rotation and attention, in three slots."""

    def __init__(self, rng):
        self.qkv = np.zeros((2, HEADS.qkv_size), np.float32)
        self.out = np.zeros((2, HEADS.attention_size), np.float32)
        angles = rng.uniform(0, 6, (CAPACITY, 16))
        self.rotation = Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
        self.norms = QkNorms(*rng.uniform(0.5, 2, (2, 32)).astype(np.float32), 1e-6)
        shape = (HEADS.num_kv_heads, CAPACITY, HEADS.head_dim)
        self.memories = [rng.standard_normal((2, *shape)).astype(np.float32) for _ in range(3)]
        self.slots = [SlotMemory(*memory) for memory in self.memories]
        size = self.memories[0][0].nbytes
        self.spans, self.cache = Spans(2, size, size), LayerCache(0, 0, CAPACITY, "f32")
        self.scratch = workspace(attention_workspace_bytes(2, CAPACITY, HEADS))

    def make(self, run):
        run.qk_norm_rope_store(self.qkv, HEADS, self.spans, self.cache, self.rotation, self.norms)
        run.attention(self.qkv, HEADS, self.spans, self.cache, 0.2, self.out, self.scratch)


def test_a_program_follows_its_spans(make_kernels, rng):
    kernels, layer, program = make_kernels("avx2", 2), Layer(rng), Program()
    layer.make(Kernels(kernels.pool, program))
    assert [call.name for call in program.calls] == ["krasis_qk_norm_rope_store", "krasis_attention"]
    assert not layer.out.any()
    for spans in (
        [Span(0, 0, 1, 5), Span(2, 1, 1, 599)],
        [Span(1, 0, 2, 300)],
        [Span(2, 0, 1, 0), Span(1, 1, 1, 301)],
    ):
        rows = rng.standard_normal(layer.qkv.shape)
        before = [memory.copy() for memory in layer.memories]
        results = []
        for do in (program.run, lambda: layer.make(kernels)):
            for memory, old in zip(layer.memories, before, strict=True):
                memory[:] = old
            layer.qkv[:] = rows
            layer.spans.set(spans, layer.slots)
            do()
            results.append((layer.out.tobytes(), *(memory.tobytes() for memory in layer.memories)))
        assert results[0] == results[1]


def test_rows_without_a_span_are_refused(make_kernels, rng):
    kernels, layer, program = make_kernels("avx2", 1), Layer(rng), Program("layer 7")
    layer.make(Kernels(kernels.pool, program))
    layer.spans.set([Span(0, 0, 1, 5)], layer.slots)
    with pytest.raises(NativeError, match="out of range") as raised:
        program.run()
    assert raised.value.where == "layer 7: krasis_qk_norm_rope_store"


def test_a_program_keeps_what_its_calls_point_into(make_kernels, rng):
    """Arrays, spans and memory that nobody else holds any more."""
    program, kernels = Program(), make_kernels("avx2", 1)
    layer = Layer(rng)
    layer.spans.set([Span(0, 0, 2, 100)], layer.slots)
    out, qkv = layer.out, layer.qkv
    layer.make(Kernels(kernels.pool, program))
    layer.make(kernels)
    want = out.copy()
    qkv[:] = 0
    layer.make(kernels)
    want = out.copy()
    del layer
    trash = [np.full(CAPACITY * 64, np.nan, np.float32) for _ in range(64)]
    out[:] = 0
    program.run()
    assert out.tobytes() == want.tobytes()
    del trash


def moe_call(kernels, ids):
    """A layer of two experts of zeros; returns what Kernels.moe returns."""
    acts = Acts.allocate(len(ids), 64)
    Kernels(kernels.pool).quantize(np.zeros((len(ids), 64), np.float32), acts)
    return kernels.moe(
        blob=np.zeros((2, 13056), np.uint8), expert_stride_bytes=13056, tiles="q8", acts=acts, ids=ids,
        weights=np.ones(ids.shape, np.float32), out=np.zeros((len(ids), 64), np.float32), intermediate=64,
        num_experts=2, scratch=workspace(moe_workspace_bytes(len(ids), 64, 64, 2, 2)),
    )  # fmt: skip


def test_a_program_counts_its_experts(make_kernels):
    pool, program = make_kernels("avx2", 1).pool, Program("token")
    ids = np.zeros((3, 2), np.int32)
    for _ in range(2):
        assert moe_call(Kernels(pool, program), ids) == 6
    assert program.num_pairs == 12
    for _ in range(2):
        program.run()
        assert program.num_executed == 12
    ids[1, 0] = -1
    program.run_some()
    assert program.num_executed == 10
    with pytest.raises(NativeError, match="not every routed expert") as raised:
        program.run()
    assert raised.value.where == "token: krasis_moe"
    assert moe_call(Kernels(pool), ids) == 5


def test_watched_calls_go_through_the_wrapper(make_kernels, rng):
    seen = []

    def wrap(name, function):
        def counted(*arguments):
            seen.append(name)
            return function(*arguments)

        return counted

    pool, layer, program = make_kernels("avx2", 1).pool, Layer(rng), Program()
    layer.spans.set([Span(0, 0, 2, 0)], layer.slots)
    layer.make(Kernels(pool, program))
    program.watch(wrap)
    program.run()
    kernels = Kernels(pool)
    kernels.watch(wrap)
    layer.make(kernels)
    assert seen == ["krasis_qk_norm_rope_store", "krasis_attention"] * 2


def test_a_call_raises_its_status():
    with pytest.raises(NativeError, match="krasis_something"):
        Call(lambda status: status, (1,), "krasis_something").run()
