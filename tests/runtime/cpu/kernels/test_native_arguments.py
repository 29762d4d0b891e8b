"""The C functions themselves, past the wrappers: null pointers and bad sizes give a status, never a crash."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from krasis.runtime.cpu.native import (
    ActivationArgs,
    ActsStruct,
    AddRowsArgs,
    AttentionArgs,
    ChooseArgs,
    IndexArgs,
    LatentArgs,
    QkvArgs,
    RouteArgs,
    SpanStruct,
    prototype,
)

ARGUMENT, SHAPE, MEMORY, RANGE = 1, 2, 5, 8


@pytest.fixture
def pool(make_kernels):
    return make_kernels("avx2", 1).pool.handle


@pytest.fixture
def memory():
    """An address with plenty of zeros behind it."""
    array = np.zeros(1 << 16, np.float32)
    yield array.ctypes.data
    assert not array.any()


def acts(memory, **changes):
    values = {"q": memory, "scale": memory, "sum": memory, "tokens": 1, "k": 32} | changes
    return ctypes.byref(ActsStruct(**values))


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"q": None}, ARGUMENT),
        ({"scale": None}, ARGUMENT),
        ({"sum": None}, ARGUMENT),
        ({"tokens": -1}, ARGUMENT),
        ({"k": 0}, ARGUMENT),
        ({"k": 33}, SHAPE),
    ],
)
def test_acts(pool, memory, changes, status):
    quantize, norm = prototype("krasis_quantize_acts"), prototype("krasis_rms_norm")
    assert quantize(pool, memory, 64, acts(memory, **changes)) == status
    bad = acts(memory, **changes)
    assert norm(pool, memory, 1, 32, memory, 1e-6, None, bad) in (status, SHAPE)


def test_quantize(pool, memory):
    quantize = prototype("krasis_quantize_acts")
    assert quantize(None, memory, 32, acts(memory)) == ARGUMENT
    assert quantize(pool, memory, 32, None) == ARGUMENT
    assert quantize(pool, None, 32, acts(memory)) == ARGUMENT
    assert quantize(pool, memory, 31, acts(memory, tokens=2)) == ARGUMENT


def test_rms_norm(pool, memory):
    norm = prototype("krasis_rms_norm")
    assert norm(None, memory, 1, 32, memory, 1e-6, memory, None) == ARGUMENT
    assert norm(pool, None, 1, 32, memory, 1e-6, memory, None) == ARGUMENT
    assert norm(pool, memory, 1, 32, None, 1e-6, memory, None) == ARGUMENT
    assert norm(pool, memory, 1, 32, memory, 1e-6, None, None) == ARGUMENT
    assert norm(pool, memory, -1, 32, memory, 1e-6, memory, None) == ARGUMENT
    assert norm(pool, memory, 1, 0, memory, 1e-6, memory, None) == ARGUMENT
    assert norm(pool, memory, 2, 32, memory, 1e-6, None, acts(memory)) == SHAPE


def refused(name, pool, record, status):
    """The function gives that status, and refuses null pointers."""
    function = prototype(name)
    assert function(pool, ctypes.byref(record)) == status
    assert function(None, ctypes.byref(record)) == ARGUMENT
    assert function(pool, None) == ARGUMENT


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"logits": None}, ARGUMENT),
        ({"ids": None}, ARGUMENT),
        ({"weights": None}, ARGUMENT),
        ({"tokens": -1}, ARGUMENT),
        ({"num_experts": 0}, ARGUMENT),
        ({"top_k": 0}, ARGUMENT),
        ({"score": 5}, ARGUMENT),
        ({"score": -1}, ARGUMENT),
        ({"group_score": 2}, ARGUMENT),
        ({"groups": 0}, ARGUMENT),
        ({"top_groups": 0}, ARGUMENT),
        ({"logit_cap": -1.0}, ARGUMENT),
        ({"scale": float("nan")}, ARGUMENT),
        ({"sum_floor": float("inf")}, ARGUMENT),
        ({"top_k": 9}, SHAPE),
        ({"groups": 3}, SHAPE),
        ({"groups": 2, "top_groups": 3}, SHAPE),
        ({"groups": 8}, SHAPE),
    ],
)
def test_route(pool, memory, changes, status):
    values = {"tokens": 1, "num_experts": 8, "top_k": 2, "groups": 1, "top_groups": 1, "scale": 1.0}
    values |= dict.fromkeys(("logits", "ids", "weights"), memory)
    refused("krasis_route", pool, RouteArgs(**(values | changes)), status)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"x": None}, ARGUMENT),
        ({"out": None}, ARGUMENT),
        ({"tokens": -1}, ARGUMENT),
        ({"intermediate": 0}, ARGUMENT),
        ({"kind": 6}, ARGUMENT),
        ({"kind": -1}, ARGUMENT),
        ({"kind": 2, "limit": 0.0}, ARGUMENT),
        ({"kind": 3, "limit": float("nan")}, ARGUMENT),
        ({"kind": 2, "limit": 1.0, "alpha": float("inf")}, ARGUMENT),
        ({"intermediate": 24}, SHAPE),
        ({"acts": True}, SHAPE),
    ],
)
def test_activation(pool, memory, changes, status):
    values = {"x": memory, "out": memory, "tokens": 1, "intermediate": 64}
    record = ActsStruct(q=memory, scale=memory, sum=memory, tokens=1, k=32)
    if "acts" in changes:
        changes = {"acts": ctypes.addressof(record)}
    refused("krasis_gated_activation", pool, ActivationArgs(**(values | changes)), status)


@pytest.mark.parametrize(
    "changes",
    [
        {"out": None},
        {"tokens": -1},
        {"k": 0},
        {"x": None, "bias": None},
        {"x": None, "logits": 4096},
    ],
)
def test_add_rows(pool, memory, changes):
    values = {"out": memory, "tokens": 1, "k": 8, "x": memory, "bias": memory}
    refused("krasis_add_rows", pool, AddRowsArgs(**(values | changes)), ARGUMENT)


BAD_SPANS = [
    ([(0, 1, 4, None, 1)], ARGUMENT),
    ([(0, 1, 4, 1, None)], ARGUMENT),
    ([(0, 1, -1, 1, 1)], ARGUMENT),
    ([(0, -1, 4, 1, 1)], ARGUMENT),
    ([(1, 1, 4, 1, 1)], ARGUMENT),
    ([(0, 2, 4, 1, 1)], RANGE),
    ([(0, 1, 2**62, 1, 1)], RANGE),
    ([(0, 1, 600, 1, 1)], RANGE),
    ([(0, 2**62, 0, 1, 1)], RANGE),
    ([], RANGE),
    ([(0, 0, 4, 1, 1)], RANGE),
    ([(0, 1, 4, 1, 1), (0, 1, 4, 1, 1)], ARGUMENT),
    ([(0, 1, 4, 1, 1), (1, 1, 4, 1, 1)], RANGE),
]
QKV = {"tokens": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "eps": 1e-6, "capacity": 600}
QKV |= {"max_positions": 600, "rotary_dims": 32}
ATTENTION = {"ldq": 64, "tokens": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "capacity": 600}
ATTENTION |= {"scale": 1.0, "workspace_bytes": 1 << 16}


def span_array(memory, rows):
    """krasis_span [len(rows)]; 1 stands for the address of memory."""
    return (SpanStruct * max(len(rows), 1))(
        *(SpanStruct(*row[:3], *(memory if part else None for part in row[3:])) for row in rows)
    )


def with_spans(kind, memory, values, rows):
    spans = span_array(memory, rows)
    return kind(**({"spans": ctypes.addressof(spans), "num_spans": len(rows)} | values)), spans


@pytest.mark.parametrize(("rows", "status"), BAD_SPANS)
def test_spans(pool, memory, rows, status):
    values = QKV | dict.fromkeys(("qkv", "cos", "sin"), memory)
    record, kept = with_spans(QkvArgs, memory, values, rows)
    refused("krasis_qk_norm_rope_store", pool, record, status)
    values = ATTENTION | dict.fromkeys(("q", "out", "workspace"), memory)
    record, kept = with_spans(AttentionArgs, memory, values, rows)
    refused("krasis_attention", pool, record, status)
    del kept


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"qkv": None}, ARGUMENT),
        ({"cos": None}, ARGUMENT),
        ({"sin": None}, ARGUMENT),
        ({"spans": None}, ARGUMENT),
        ({"num_spans": -1}, ARGUMENT),
        ({"kv_dtype": 1}, ARGUMENT),
        ({"tokens": -1}, ARGUMENT),
        ({"num_kv_heads": 0}, ARGUMENT),
        ({"rotary_dims": -2}, ARGUMENT),
        ({"norm": 3}, ARGUMENT),
        ({"norm": 1}, ARGUMENT),
        ({"rope_style": 2}, ARGUMENT),
        ({"clip": -1.0}, ARGUMENT),
        ({"clip": float("nan")}, ARGUMENT),
        ({"keys_offset_bytes": -4}, ARGUMENT),
        ({"values_offset_bytes": 2}, SHAPE),
        ({"rotary_dims": 34}, SHAPE),
        ({"rotary_dims": 31}, SHAPE),
        ({"head_dim": 40}, SHAPE),
        ({"max_positions": 4}, RANGE),
        ({"capacity": 4}, RANGE),
        ({"capacity": 0, "ring": 1}, SHAPE),
        ({"capacity": 100, "ring": 1}, SHAPE),
        ({"tokens": 2}, RANGE),
    ],
)
def test_rope(pool, memory, changes, status):
    values = QKV | dict.fromkeys(("qkv", "cos", "sin"), memory) | changes
    record, kept = with_spans(QkvArgs, memory, values, [(0, 1, 4, 1, 1)])
    refused("krasis_qk_norm_rope_store", pool, record, status)
    del kept


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"q": None}, ARGUMENT),
        ({"out": None}, ARGUMENT),
        ({"spans": None}, ARGUMENT),
        ({"kv_dtype": 1}, ARGUMENT),
        ({"workspace_bytes": -1}, ARGUMENT),
        ({"window": -1}, ARGUMENT),
        ({"num_heads": 3, "num_kv_heads": 2}, SHAPE),
        ({"head_dim": 40}, SHAPE),
        ({"ldq": 63}, SHAPE),
        ({"keys_offset_bytes": 2}, SHAPE),
        ({"keys_offset_bytes": 2, "kv_dtype": 3}, SHAPE),
        ({"tokens": 2**62}, RANGE),
        ({"ring": 1, "window": 64}, SHAPE),
        ({"ring": 1, "capacity": 128}, ARGUMENT),
        ({"ring": 1, "capacity": 128, "window": 129}, RANGE),
        ({"workspace": None}, MEMORY),
        ({"workspace_bytes": 100}, MEMORY),
    ],
)
def test_attention(pool, memory, changes, status):
    values = ATTENTION | dict.fromkeys(("q", "out", "workspace"), memory) | changes
    record, kept = with_spans(AttentionArgs, memory, values, [(0, 1, 300, 1, 1)])
    refused("krasis_attention", pool, record, status)
    del kept


def test_prefault_and_unmap():
    assert prototype("krasis_prefault")(None, 1) == ARGUMENT
    assert prototype("krasis_unmap_file")(None, 1) == ARGUMENT
    assert prototype("krasis_unmap_file")(4096, 0) == ARGUMENT
    assert prototype("krasis_map_file")(-1, 4096, 4096, ctypes.byref(ctypes.c_void_p())) == ARGUMENT
    assert prototype("krasis_map_file")(0, 4096, 4096, None) == ARGUMENT


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"q": None}, ARGUMENT),
        ({"kv": None}, ARGUMENT),
        ({"norm": None}, ARGUMENT),
        ({"queries": None}, ARGUMENT),
        ({"acts": None}, ARGUMENT),
        ({"cos": None}, ARGUMENT),
        ({"spans": None}, ARGUMENT),
        ({"tokens": -1}, ARGUMENT),
        ({"num_heads": 0}, ARGUMENT),
        ({"kv_rank": 2**40}, ARGUMENT),
        ({"rope_style": 2}, ARGUMENT),
        ({"temperature_scale": -1.0}, ARGUMENT),
        ({"temperature_scale": float("nan")}, ARGUMENT),
        ({"temperature_scale": 1.0, "temperature_period": 0}, ARGUMENT),
        ({"kv_dtype": 1}, ARGUMENT),
        ({"kv_dtype": 4}, ARGUMENT),
        ({"kv_dtype": 3, "keys_offset_bytes": 2}, SHAPE),
        ({"kv_dtype": 3, "kv_rank": 576, "ldkv": 640}, SHAPE),
        ({"nope_dim": 48}, SHAPE),
        ({"nope_dim": 64}, SHAPE),
        ({"kv_rank": 40}, SHAPE),
        ({"rotary_dims": 8}, SHAPE),
        ({"ldq": 47}, SHAPE),
        ({"ldkv": 79}, SHAPE),
        ({"num_heads": 2, "ldq": 96}, SHAPE),
        ({"max_positions": 0}, RANGE),
        ({"capacity": 0}, RANGE),
    ],
)
def test_latent_store(pool, memory, changes, status):
    own = ActsStruct(q=memory, scale=memory, sum=memory, tokens=1, k=32)
    span = SpanStruct(first_row=0, rows=1, start=0, keys=memory, values=memory)
    values = {
        "tokens": 1,
        "num_heads": 1,
        "nope_dim": 32,
        "rope_dim": 16,
        "kv_rank": 64,
        "ldq": 48,
        "ldkv": 80,
    }
    values |= {"rotary_dims": 16, "max_positions": 1, "num_spans": 1, "capacity": 1}
    values |= dict.fromkeys(("q", "kv", "norm", "cos", "sin", "queries"), memory)
    values |= {"acts": ctypes.addressof(own), "spans": ctypes.addressof(span)}
    refused("krasis_latent_store", pool, LatentArgs(**(values | changes)), status)


def test_gemm_int8_heads(pool, memory):
    gemm = prototype("krasis_gemm_int8_heads")
    two = acts(memory, tokens=2)
    assert gemm(None, two, memory, memory, 2, 32, memory, 32, 64) == ARGUMENT
    assert gemm(pool, None, memory, memory, 2, 32, memory, 32, 64) == ARGUMENT
    for missing in range(3):
        pointers = [None if i == missing else memory for i in range(3)]
        assert gemm(pool, two, *pointers[:2], 2, 32, pointers[2], 32, 64) == ARGUMENT
    assert gemm(pool, two, memory, memory, 0, 32, memory, 32, 64) == ARGUMENT
    assert gemm(pool, two, memory, memory, 2, -32, memory, 32, 64) == ARGUMENT
    assert gemm(pool, two, memory, memory, 2, 32, memory, 31, 64) == ARGUMENT
    assert gemm(pool, two, memory, memory, 2, 32, memory, 32, 63) == ARGUMENT
    assert gemm(pool, two, memory, memory, 2, 48, memory, 48, 96) == SHAPE
    assert gemm(pool, acts(memory, tokens=3), memory, memory, 2, 32, memory, 32, 64) == SHAPE


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"block": 0}, ARGUMENT),
        ({"block": -4}, ARGUMENT),
        ({"block": 257}, ARGUMENT),
        ({"block": 1}, ARGUMENT),  # of tokens there are no gates
        ({"gates": None}, ARGUMENT),
        ({"positions": None}, ARGUMENT),
        ({"dim": 24}, SHAPE),
        ({"capacity": 0}, RANGE),
    ],
)
def test_keys_of_pools(pool, memory, changes, status):
    values = dict.fromkeys(("k", "norm", "bias", "gates", "positions"), memory)
    values |= {"tokens": 1, "heads": 2, "dim": 16, "block": 4, "capacity": 8, "num_spans": 1}
    span = SpanStruct(first_row=0, rows=1, start=0, keys=memory, values=memory)
    values |= {"spans": ctypes.addressof(span)}
    refused("krasis_index_store", pool, IndexArgs(**values | changes), status)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"block": 0}, ARGUMENT),
        ({"block": 3}, ARGUMENT),  # of which a budget of 4 is no multiple
        ({"block": 512, "budget": 512}, ARGUMENT),
        ({"budget": 2**31 - 8}, ARGUMENT),
        ({"chosen": None}, ARGUMENT),
        ({"workspace": None, "start": 7}, MEMORY),
    ],
)
def test_choice_of_pools(pool, memory, changes, status):
    values = {"q": memory, "weights": memory, "chosen": memory, "workspace": memory}
    values |= {"tokens": 1, "heads": 2, "dim": 16, "block": 4, "budget": 4, "capacity": 8, "num_spans": 1}
    span = SpanStruct(first_row=0, rows=1, start=changes.pop("start", 0), keys=memory, values=memory)
    values |= {"workspace_bytes": 1 << 12, "spans": ctypes.addressof(span)}
    refused("krasis_choose", pool, ChooseArgs(**values | changes), status)


@pytest.mark.parametrize(
    ("name", "arguments", "status"),
    [
        ("krasis_hyper_sum", (None, 1, 4, 16, 0, 4, 0), ARGUMENT),
        ("krasis_hyper_sum", (0, 1, 4, 16, 0, 3, 0), SHAPE),  # fewer shares than streams
        ("krasis_hyper_sum", (0, 1, 65, 16, 0, 65, 0), SHAPE),
        ("krasis_hyper_sum", (0, 1, 4, 24, 0, 4, 0), SHAPE),
        ("krasis_hyper_sum", (0, -1, 4, 16, 0, 4, 0), SHAPE),
        ("krasis_hyper_add", (0, None, 0, 1, 4, 16), ARGUMENT),
        ("krasis_hyper_add", (0, 0, 0, 1, 0, 16), SHAPE),
        ("krasis_hyper_weights", (0, 1, 4, 16, 0.0, 0, 25, 0, 0, 0.0, 20), SHAPE),
        ("krasis_hyper_weights", (0, 1, 4, 16, 0.0, 0, 24, None, 0, 0.0, 20), ARGUMENT),
        ("krasis_hyper_weights", (0, 1, 4, 16, 0.0, 0, 24, 0, 0, 0.0, -1), ARGUMENT),
    ],
)
def test_mixed_streams(pool, memory, name, arguments, status):
    """0 stands for an address where the function takes one."""
    function = prototype(name)
    types = function.argtypes[1:]
    given = [
        memory if kind is ctypes.c_void_p and one == 0 and one is not None else one
        for one, kind in zip(arguments, types, strict=True)
    ]
    assert function(pool, *given) == status
    assert function(None, *given) in (ARGUMENT, SHAPE)
