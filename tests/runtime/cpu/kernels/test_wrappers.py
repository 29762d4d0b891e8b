"""The Python wrappers refuse what native code must never see."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from sequences import place

from krasis.formats.errors import NativeError
from krasis.formats.models.mlps import Activation, Router
from krasis.formats.native import Pool
from krasis.runtime.cpu import native_arrays
from krasis.runtime.cpu.heads import QkNorms, Rotation
from krasis.runtime.cpu.kernels import (
    Acts,
    Heads,
    Kernels,
    attention_workspace_bytes,
    moe_workspace_bytes,
    workspace,
)
from krasis.runtime.cpu.native import prototype
from krasis.runtime.cpu.native_arrays import aligned_empty
from krasis.runtime.cpu.spans import LayerCache

F32 = np.float32


@pytest.fixture
def plain(make_kernels):
    return make_kernels("avx2", 1)


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "x",
    [
        zeros(2, 32),
        zeros(3, 64),
        zeros(3, 32, dtype=np.float64),
        zeros(96),
        zeros(32, 3).T,
        zeros(6, 32)[::2],
        zeros(3, 32).astype(">f4"),
    ],
    ids=["rows", "columns", "dtype", "rank", "transposed", "strided", "byte order"],
)
def test_quantize_refuses(plain, x):
    with pytest.raises(NativeError, match=r"quantize\.x"):
        plain.quantize(x, Acts.allocate(3, 32))


@pytest.mark.parametrize("change", ["weight", "out", "out_read_only", "acts_tokens", "acts_k", "rank"])
def test_rms_norm_refuses(plain, change):
    x, weight, out, acts = zeros(3, 64), zeros(64), zeros(3, 64), Acts.allocate(3, 64)
    if change == "weight":
        weight = zeros(32)
    elif change == "out":
        out = zeros(2, 64)
    elif change == "out_read_only":
        out = read_only(out)
    elif change == "acts_tokens":
        acts = Acts.allocate(2, 64)
    elif change == "acts_k":
        acts = Acts.allocate(3, 32)
    else:
        x = zeros(3, 64, 1)
    with pytest.raises(NativeError, match="rms_norm"):
        plain.rms_norm(x, weight, 1e-6, out, acts)
    assert not out.any()


def test_rms_norm_needs_an_output(plain):
    with pytest.raises(NativeError, match="krasis_rms_norm"):
        plain.rms_norm(zeros(1, 32), zeros(32), 1e-6)


@pytest.mark.parametrize(
    ("acts", "weight", "scales", "out"),
    [
        ((3, 64), (1, 16, 32, 4), (64,), (3, 32)),
        ((3, 64), (2, 16, 32, 4), (32,), (3, 32)),
        ((3, 64), (1, 8, 32, 4), (32,), (3, 32)),
        ((2, 64), (1, 16, 32, 4), (32,), (3, 32)),
        ((3, 64), (1, 16, 32, 4), (32,), (3, 33)),
    ],
)
def test_gemm_int8_rows_refuses(plain, acts, weight, scales, out):
    with pytest.raises(NativeError, match="gemm_int8_rows"):
        plain.gemm_int8_rows(Acts.allocate(*acts), zeros(*weight, dtype=np.int8), zeros(*scales), zeros(*out))


@pytest.mark.parametrize(
    ("weight", "out"),
    [(zeros(8, 32), zeros(3, 8)), (zeros(8, 64, dtype=np.int16), zeros(3, 8)), (zeros(8, 64), zeros(3, 9))],
)
def test_gemm_float_refuses(plain, weight, out):
    with pytest.raises(NativeError, match="gemm_float"):
        plain.gemm_float(zeros(3, 64), weight, out)


@pytest.mark.parametrize(("ids", "weights"), [((3, 2), (3, 3)), ((2, 2), (3, 2))])
def test_route_refuses(plain, ids, weights):
    with pytest.raises(NativeError, match="route"):
        plain.route(zeros(3, 8), Router(top_k=2), zeros(*ids, dtype=np.int32), zeros(*weights))


def test_route_refuses_wide_ids(plain):
    with pytest.raises(NativeError, match=r"route\.ids"):
        plain.route(zeros(3, 8), Router(top_k=2), zeros(3, 2, dtype=np.int64), zeros(3, 2))


def two_rows():
    """Two rows of one sequence in memory of 2 heads, 50 positions, 32 channels."""
    return place(zeros(2, 50, 32), zeros(2, 50, 32), 0, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", zeros(2, 200)),
        ("qkv", zeros(2, 256, dtype=np.float16)),
        ("q_norm", QkNorms(zeros(16), zeros(32), 1e-6)),
        ("k_norm", QkNorms(zeros(32), zeros(32, dtype=np.float64), 1e-6)),
        ("q_norm", QkNorms(zeros(32), zeros(64), 1e-6, "flat")),
        ("cos", Rotation(zeros(50), zeros(50, 16))),
        ("sin", Rotation(zeros(50, 16), zeros(40, 16))),
        ("bias", zeros(200)),
        ("cache", LayerCache(0, 0, 51, "f32")),
        ("cache", LayerCache(4, 0, 50, "f32")),
        ("cache", LayerCache(0, -4, 50, "f32")),
        ("cache", LayerCache(0, 0, 50, "bf16")),
    ],
)
def test_rope_refuses(plain, name, value):
    spans, cache = two_rows()
    rotation = Rotation(zeros(50, 16), zeros(50, 16))
    arguments = {"qkv": zeros(2, 256), "heads": Heads(4, 2, 32), "spans": spans, "cache": cache}
    arguments |= {"rotation": rotation, "norms": QkNorms(zeros(32), zeros(32), 1e-6), "bias": None}
    plain.qk_norm_rope_store(**arguments)
    place_of = {"q_norm": "norms", "k_norm": "norms", "cos": "rotation", "sin": "rotation"}
    with pytest.raises(NativeError, match=name):
        plain.qk_norm_rope_store(**(arguments | {place_of.get(name, name): value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", zeros(2, 127)),
        ("q", zeros(2, 128, dtype=np.float16)),
        ("cache", LayerCache(0, 0, 60, "f32")),
        ("out", zeros(2, 256)),
        ("out", zeros(1, 128)),
        ("out", read_only(zeros(2, 128))),
        ("scratch", zeros(64)),
        ("sinks", zeros(2)),
    ],
)
def test_attention_refuses(plain, name, value):
    spans, cache = two_rows()
    arguments = {"q": zeros(2, 128), "heads": Heads(4, 2, 32), "spans": spans, "cache": cache, "scale": 1.0}
    arguments |= {"out": zeros(2, 128), "scratch": workspace(0)}
    plain.attention(**arguments)
    with pytest.raises(NativeError, match=name):
        plain.attention(**(arguments | {name: value}))


@pytest.mark.parametrize(
    ("router", "parts", "where"),
    [
        (Router(top_k=2, bias=True), {}, "bias"),
        (Router(top_k=2), {"bias": zeros(8)}, "bias"),
        (Router(top_k=2, correction_bias=True), {"correction_bias": zeros(7)}, "correction_bias"),
        (Router(top_k=2, expert_scale=True), {"expert_scale": zeros(8, dtype=np.float64)}, "expert_scale"),
        (Router(top_k=2, by_token=True), {}, "router"),
    ],
)
def test_route_refuses_parts(plain, router, parts, where):
    with pytest.raises(NativeError, match=rf"route\.{where}"):
        plain.route(zeros(3, 8), router, zeros(3, 2, dtype=np.int32), zeros(3, 2), **parts)


@pytest.mark.parametrize(
    "arguments",
    [
        {"out": zeros(3, 128)},
        {"out": zeros(2, 64)},
        {"acts": Acts.allocate(3, 32)},
        {"x": zeros(3, 127), "out": zeros(3, 63)},
        {"x": zeros(3, 128, dtype=np.float16), "out": zeros(3, 64)},
        {"activation": Activation("situ", 1.0), "out": zeros(3, 64)},
        {},
    ],
)
def test_gated_activation_refuses(plain, arguments):
    with pytest.raises(NativeError, match="gated_activation"):
        plain.gated_activation(**({"x": zeros(3, 128), "activation": Activation()} | arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": zeros(3, 32)},
        {"bias": zeros(63)},
        {"x": zeros(3, 64), "logits": zeros(3)},
        {"logits": zeros(3, 1)},
        {},
    ],
)
def test_add_rows_refuses(plain, arguments):
    with pytest.raises(NativeError, match="add_rows"):
        plain.add_rows(zeros(3, 64), **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tiles", "q4"),
        ("expert_stride_bytes", 12288),
        ("num_experts", 3),
        ("ids", zeros(3, 2, dtype=np.int32)),
        ("ids", zeros(2, 2, dtype=np.int64)),
        ("weights", zeros(2, 3)),
        ("out", zeros(2, 128)),
        ("blob", zeros(2, 13056, dtype=np.int8)),
        ("activation", Activation("situ", 1.0)),
        ("activation", Activation("swiglu_offset", limit=0.0)),
    ],
)
def test_moe_refuses(plain, name, value):
    arguments = {
        "blob": zeros(2, 13056, dtype=np.uint8),  # 3 * 64 * 64 weights: 12 tiles of 1088 bytes
        "expert_stride_bytes": 13056,
        "tiles": "q8",
        "acts": Acts.allocate(2, 64),
        "ids": zeros(2, 2, dtype=np.int32),
        "weights": zeros(2, 2),
        "out": zeros(2, 64),
        "intermediate": 64,
        "num_experts": 2,
        "scratch": workspace(moe_workspace_bytes(2, 64, 64, 2, 2)),
    }
    plain.quantize(zeros(2, 64), arguments["acts"])
    assert plain.moe(**arguments) == 4
    with pytest.raises(NativeError, match="moe"):
        plain.moe(**(arguments | {name: value}))


def test_acts_buffers():
    acts = Acts.allocate(5, 96)
    assert (acts.q.ctypes.data % 64, acts.scale.ctypes.data % 64, acts.sum.ctypes.data % 64) == (0, 0, 0)
    assert (acts.q.shape, acts.scale.shape, acts.sum.shape) == ((5, 96), (5, 3), (5, 3))
    assert acts.view(5) is acts
    part = acts.view(2)
    assert part is acts.view(2)
    assert (part.tokens, part.q.shape) == (2, (2, 96))
    assert part.q.ctypes.data == acts.q.ctypes.data
    for tokens in (6, -1):
        with pytest.raises(NativeError, match="acts"):
            acts.view(tokens)
    for k in (0, 48):
        with pytest.raises(NativeError, match="acts"):
            Acts.allocate(1, k)


def test_impossible_sizes_are_refused():
    for rows, end, dim in ((-1, 0, 16), (0, -1, 16), (2**41, 0, 16), (1, 2**62, 16), (1, 1, 592)):
        with pytest.raises(NativeError, match="krasis_attention_workspace_bytes"):
            attention_workspace_bytes(rows, end, Heads(1, 1, dim))
    with pytest.raises(NativeError, match="krasis_moe_workspace_bytes"):
        moe_workspace_bytes(-1, 64, 64, 2, 2)


def test_unknown_functions_are_named():
    with pytest.raises(NativeError, match="krasis_nothing"):
        prototype("krasis_nothing")


def test_closed_pool_is_refused():
    pool = Pool(1, "avx2")
    kernels = Kernels(pool)
    pool.close()
    with pytest.raises(NativeError, match="closed"):
        kernels.quantize(zeros(1, 32), Acts.allocate(1, 32))


def test_addresses_are_forgotten_with_their_arrays():
    """A new array at the id of a dead one must not inherit its address."""
    gc.collect()
    before = len(native_arrays._known)
    for size in range(1, 200):
        array = zeros(size)
        assert native_arrays.pointer(array, (size,), np.dtype(F32), "x") == array.ctypes.data
        del array
    assert len(native_arrays._known) <= before + 1


@pytest.mark.parametrize("alignment_bytes", [64, 4096, 2 << 20])
def test_aligned_empty(alignment_bytes):
    array = aligned_empty((3, 5), np.float16, alignment_bytes)
    assert array.ctypes.data % alignment_bytes == 0
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((3, 5), np.float16, True)
