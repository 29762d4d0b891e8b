"""The C functions themselves, past the wrappers: null pointers and bad sizes give a status, never a crash."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from krasis.runtime.cpu.native import ActsStruct, AttentionArgs, QkvArgs, prototype

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


def test_route(pool, memory):
    route = prototype("krasis_route_topk")
    assert route(None, memory, 1, 8, 2, 1, memory, memory) == ARGUMENT
    assert route(pool, None, 1, 8, 2, 1, memory, memory) == ARGUMENT
    assert route(pool, memory, 1, 8, 2, 1, None, memory) == ARGUMENT
    assert route(pool, memory, 1, 8, 2, 1, memory, None) == ARGUMENT
    assert route(pool, memory, -1, 8, 2, 1, memory, memory) == ARGUMENT
    assert route(pool, memory, 1, 0, 2, 1, memory, memory) == ARGUMENT


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"qkv": None}, ARGUMENT),
        ({"cos": None}, ARGUMENT),
        ({"sin": None}, ARGUMENT),
        ({"k_cache": None}, ARGUMENT),
        ({"v_cache": None}, ARGUMENT),
        ({"kv_dtype": 1}, ARGUMENT),
        ({"tokens": -1}, ARGUMENT),
        ({"num_kv_heads": 0}, ARGUMENT),
        ({"head_dim": 40}, SHAPE),
        ({"max_positions": 4}, RANGE),
        ({"capacity": 4}, RANGE),
        ({"start": 2**62}, RANGE),
        ({"tokens": 2**62, "start": 2**62}, RANGE),
    ],
)
def test_rope(pool, memory, changes, status):
    values = {"tokens": 1, "start": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "eps": 1e-6}
    values |= {"kv_dtype": 0, "max_positions": 8, "capacity": 8}
    values |= dict.fromkeys(("qkv", "cos", "sin", "k_cache", "v_cache"), memory)
    assert prototype("krasis_qk_norm_rope_store")(pool, ctypes.byref(QkvArgs(**(values | changes)))) == status
    assert prototype("krasis_qk_norm_rope_store")(None, ctypes.byref(QkvArgs(**values))) == ARGUMENT
    assert prototype("krasis_qk_norm_rope_store")(pool, None) == ARGUMENT


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"q": None}, ARGUMENT),
        ({"out": None}, ARGUMENT),
        ({"k_cache": None}, ARGUMENT),
        ({"v_cache": None}, ARGUMENT),
        ({"kv_dtype": 1}, ARGUMENT),
        ({"workspace_bytes": -1}, ARGUMENT),
        ({"num_heads": 3, "num_kv_heads": 2}, SHAPE),
        ({"head_dim": 40}, SHAPE),
        ({"ldq": 63}, SHAPE),
        ({"start": 600}, RANGE),
        ({"tokens": 2**62}, RANGE),
        ({"start": 300, "workspace": None}, MEMORY),
        ({"start": 300, "workspace_bytes": 100}, MEMORY),
    ],
)
def test_attention(pool, memory, changes, status):
    values = {"ldq": 64, "tokens": 1, "start": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    values |= {"kv_dtype": 0, "capacity": 600, "scale": 1.0, "workspace_bytes": 1 << 16}
    values |= dict.fromkeys(("q", "k_cache", "v_cache", "out", "workspace"), memory)
    assert prototype("krasis_attention")(pool, ctypes.byref(AttentionArgs(**(values | changes)))) == status
    assert prototype("krasis_attention")(None, ctypes.byref(AttentionArgs(**values))) == ARGUMENT
    assert prototype("krasis_attention")(pool, None) == ARGUMENT


def test_prefault_and_unmap():
    assert prototype("krasis_prefault")(None, 1) == ARGUMENT
    assert prototype("krasis_unmap_file")(None, 1) == ARGUMENT
    assert prototype("krasis_unmap_file")(4096, 0) == ARGUMENT
    assert prototype("krasis_map_file")(-1, 4096, 4096, ctypes.byref(ctypes.c_void_p())) == ARGUMENT
    assert prototype("krasis_map_file")(0, 4096, 4096, None) == ARGUMENT
