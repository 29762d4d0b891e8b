"""One checked Python call per native compute function. NumPy only: torch is never imported here.

Every method checks shapes, dtypes and contiguity, calls ``libkrasis_cpu`` and turns its status into an error
(NativeError for arguments, ResourceError for memory). T: tokens of a call; T = 0 does nothing.
A ``Kernels`` belongs to one thread at a time, as its pool does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from krasis.formats.errors import NativeError
from krasis.formats.layouts import STRIP_ROWS
from krasis.formats.layouts.cpu_tiles import BLOCK_K, TILE_BYTES, TILE_ROWS
from krasis.formats.layouts.native_pack import TILE_CODES
from krasis.formats.native import Pool, check
from krasis.runtime.cpu.native import ActsStruct, AttentionArgs, MoeArgs, QkvArgs, prototype
from krasis.runtime.cpu.native_arrays import (
    F16,
    F32,
    I8,
    I32,
    U8,
    U16,
    Array,
    aligned_empty,
    out_pointer,
    pointer,
    shape_2d,
)

_MAX_VIEWS = 64

NativeFunction = Callable[..., int]
# The attributes of Kernels that hold native functions, by the name of the function.
FUNCTION_ATTRIBUTES = {
    "krasis_quantize_acts": "_quantize",
    "krasis_rms_norm": "_rms_norm",
    "krasis_gemm_int8_rows": "_gemm_int8_rows",
    "krasis_gemm_float": "_gemm_float",
    "krasis_route_topk": "_route",
    "krasis_qk_norm_rope_store": "_rope",
    "krasis_attention": "_attention",
    "krasis_moe": "_moe",
}


class Acts:
    """Activations as int8 per block of 32: ``q`` int8 [T, k], ``scale`` float32, ``sum`` int32 [T, k/32]."""

    __slots__ = ("_struct", "_views", "k", "q", "ref", "scale", "sum", "tokens")

    def __init__(self, q: Array, scale: Array, sums: Array) -> None:
        self.tokens, self.k = shape_2d(q, "acts.q")
        if self.k <= 0 or self.k % BLOCK_K:
            raise NativeError("k is not a multiple of the block", where="acts", got=self.k, limit=BLOCK_K)
        blocks = (self.tokens, self.k // BLOCK_K)
        self.q, self.scale, self.sum = q, scale, sums
        self._struct = ActsStruct(
            out_pointer(q, q.shape, I8, "acts.q"),
            out_pointer(scale, blocks, F32, "acts.scale"),
            out_pointer(sums, blocks, I32, "acts.sum"),
            self.tokens,
            self.k,
        )
        self.ref = ctypes.byref(self._struct)
        self._views: dict[int, Acts] = {}

    @classmethod
    def allocate(cls, max_tokens: int, k: int) -> Acts:
        """Uninitialised buffers for max_tokens tokens of k elements, 64-byte aligned."""
        blocks = (max_tokens, k // BLOCK_K)
        return cls(aligned_empty((max_tokens, k), I8), aligned_empty(blocks, F32), aligned_empty(blocks, I32))

    def view(self, tokens: int) -> Acts:
        """The first ``tokens`` rows of the same buffers (the same object when asked again)."""
        if tokens == self.tokens:
            return self
        found = self._views.get(tokens)
        if found is None:
            if not 0 <= tokens <= self.tokens:
                raise NativeError(
                    "more tokens than the buffer holds", where="acts", got=tokens, limit=self.tokens
                )
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            found = self._views[tokens] = Acts(self.q[:tokens], self.scale[:tokens], self.sum[:tokens])
        return found


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of a layer: query heads, key/value heads (a divisor), elements of a head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def qkv_size(self) -> int:
        """Columns of the fused projection: queries, keys, values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attention_size(self) -> int:
        """Columns of the attention's output."""
        return self.num_heads * self.head_dim


def attention_workspace_bytes(tokens: int, start: int, heads: Heads) -> int:
    """Workspace of ``Kernels.attention``; never less for fewer tokens or an earlier start."""
    function = prototype("krasis_attention_workspace_bytes")
    return _size(function(tokens, start, heads.num_heads, heads.head_dim), "krasis_attention_workspace_bytes")


def moe_workspace_bytes(tokens: int, hidden: int, intermediate: int, num_experts: int, top_k: int) -> int:
    """Workspace of ``Kernels.moe``."""
    function = prototype("krasis_moe_workspace_bytes")
    return _size(function(tokens, hidden, intermediate, num_experts, top_k), "krasis_moe_workspace_bytes")


def workspace(num_bytes: int) -> Array:
    """An uninitialised 64-byte aligned uint8 [num_bytes]."""
    return aligned_empty((num_bytes,), U8)


def _size(num_bytes: int, function: str) -> int:
    if num_bytes < 0:
        raise NativeError("sizes are out of their domain", where=function)
    return num_bytes


class Kernels:
    """The native compute functions on one pool."""

    __slots__ = (
        "_attention",
        "_attention_args",
        "_executed",
        "_gemm_float",
        "_gemm_int8_rows",
        "_moe",
        "_moe_args",
        "_qkv_args",
        "_quantize",
        "_rms_norm",
        "_rope",
        "_route",
        "pool",
    )

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._quantize: NativeFunction = prototype("krasis_quantize_acts")
        self._rms_norm: NativeFunction = prototype("krasis_rms_norm")
        self._gemm_int8_rows: NativeFunction = prototype("krasis_gemm_int8_rows")
        self._gemm_float: NativeFunction = prototype("krasis_gemm_float")
        self._route: NativeFunction = prototype("krasis_route_topk")
        self._rope: NativeFunction = prototype("krasis_qk_norm_rope_store")
        self._attention: NativeFunction = prototype("krasis_attention")
        self._moe: NativeFunction = prototype("krasis_moe")
        # One record of each kind, filled anew by every call: a pool serves one call at a time.
        self._qkv_args, self._attention_args, self._moe_args = QkvArgs(), AttentionArgs(), MoeArgs()
        self._executed = ctypes.c_int64()
        self._moe_args.executed = ctypes.addressof(self._executed)

    def watch(self, wrap: Callable[[str, NativeFunction], NativeFunction]) -> None:
        """Every native function is called through wrap(name, function) from now on: for profiles."""
        for name, attribute in FUNCTION_ATTRIBUTES.items():
            setattr(self, attribute, wrap(name, getattr(self, attribute)))

    def quantize(self, x: Array, acts: Acts) -> None:
        """acts = int8 form of x, float32 [T, k]."""
        address = pointer(x, acts.q.shape, F32, "quantize.x")
        check(self._quantize(self.pool.handle, address, acts.k, acts.ref), "krasis_quantize_acts")

    def rms_norm(
        self, x: Array, weight: Array, eps: float, out: Array | None = None, acts: Acts | None = None
    ) -> None:
        """out and/or acts = x / rms(x) * weight; x, out float32 [T, k] (out may be x), weight float32 [k]."""
        tokens, k = shape_2d(x, "rms_norm.x")
        if acts is not None and (acts.tokens != tokens or acts.k != k):
            raise NativeError("acts do not fit x", where="rms_norm", got=acts.q.shape, limit=x.shape)
        status = self._rms_norm(
            self.pool.handle,
            pointer(x, (tokens, k), F32, "rms_norm.x"),
            tokens,
            k,
            pointer(weight, (k,), F32, "rms_norm.weight"),
            eps,
            None if out is None else out_pointer(out, (tokens, k), F32, "rms_norm.out"),
            None if acts is None else acts.ref,
        )
        check(status, "krasis_rms_norm")

    def gemm_int8_rows(
        self, acts: Acts, weight: Array, scales: Array, out: Array, accumulate: bool = False
    ) -> None:
        """out [T, n] (+)= acts x weight^T; out, scales [n] float32; weight int8 [n/32, k/4, 32, 4]."""
        _, n = shape_2d(out, "gemm_int8_rows.out")
        status = self._gemm_int8_rows(
            self.pool.handle,
            acts.ref,
            pointer(weight, (n // STRIP_ROWS, acts.k // 4, STRIP_ROWS, 4), I8, "gemm_int8_rows.weight"),
            pointer(scales, (n,), F32, "gemm_int8_rows.scales"),
            n,
            out_pointer(out, (acts.tokens, n), F32, "gemm_int8_rows.out"),
            n,
            1 if accumulate else 0,
        )
        check(status, "krasis_gemm_int8_rows")

    def gemm_float(self, x: Array, weight: Array, out: Array) -> None:
        """out [T, n] = x [T, k] x weight [n, k]^T in float32; weight float32, float16, or BF16 as uint16."""
        tokens, k = shape_2d(x, "gemm_float.x")
        n = shape_2d(weight, "gemm_float.weight")[0]
        kind = weight.dtype
        code = 0 if kind == F32 else 1 if kind == U16 else 2
        status = self._gemm_float(
            self.pool.handle,
            pointer(x, (tokens, k), F32, "gemm_float.x"),
            tokens,
            k,
            pointer(weight, (n, k), (F32, U16, F16)[code], "gemm_float.weight"),
            code,
            n,
            out_pointer(out, (tokens, n), F32, "gemm_float.out"),
        )
        check(status, "krasis_gemm_float")

    def route_topk(self, logits: Array, top_k: int, normalize: bool, ids: Array, weights: Array) -> None:
        """ids int32, weights float32 [T, top_k] = top_k of softmax(logits [T, experts]), largest first."""
        tokens, num_experts = shape_2d(logits, "route_topk.logits")
        status = self._route(
            self.pool.handle,
            pointer(logits, (tokens, num_experts), F32, "route_topk.logits"),
            tokens,
            num_experts,
            top_k,
            1 if normalize else 0,
            out_pointer(ids, (tokens, top_k), I32, "route_topk.ids"),
            out_pointer(weights, (tokens, top_k), F32, "route_topk.weights"),
        )
        check(status, "krasis_route_topk")

    def qk_norm_rope_store(
        self,
        qkv: Array,
        start: int,
        heads: Heads,
        q_norm: Array | None,
        k_norm: Array | None,
        eps: float,
        cos: Array,
        sin: Array,
        k_cache: Array,
        v_cache: Array,
    ) -> None:
        """Norm and rotate q in place; norm and rotate k, and copy v, into the caches at start..start+T-1.

        qkv float32 [T, heads.qkv_size]; norms float32 [head_dim] or None; cos, sin float32
        [positions, head_dim/2]; caches float32 or float16 [num_kv_heads, capacity, head_dim].
        """
        args, dim = self._qkv_args, heads.head_dim
        tokens, _ = shape_2d(qkv, "qk_norm_rope_store.qkv")
        tables = (len(cos), dim // 2)
        capacity, kv_dtype = _cache_shape(k_cache, heads)
        caches = (heads.num_kv_heads, capacity, dim)
        args.qkv = out_pointer(qkv, (tokens, heads.qkv_size), F32, "qk_norm_rope_store.qkv")
        args.tokens, args.start, args.eps = tokens, start, eps
        args.num_heads, args.num_kv_heads, args.head_dim = heads.num_heads, heads.num_kv_heads, dim
        args.q_norm = None if q_norm is None else pointer(q_norm, (dim,), F32, "qk_norm_rope_store.q_norm")
        args.k_norm = None if k_norm is None else pointer(k_norm, (dim,), F32, "qk_norm_rope_store.k_norm")
        args.cos = pointer(cos, tables, F32, "qk_norm_rope_store.cos")
        args.sin = pointer(sin, tables, F32, "qk_norm_rope_store.sin")
        args.max_positions, args.capacity, args.kv_dtype = tables[0], capacity, kv_dtype
        args.k_cache = out_pointer(k_cache, caches, k_cache.dtype, "qk_norm_rope_store.k_cache")
        args.v_cache = out_pointer(v_cache, caches, k_cache.dtype, "qk_norm_rope_store.v_cache")
        check(self._rope(self.pool.handle, ctypes.byref(args)), "krasis_qk_norm_rope_store")

    def attention(
        self,
        q: Array,
        start: int,
        heads: Heads,
        k_cache: Array,
        v_cache: Array,
        scale: float,
        out: Array,
        scratch: Array,
    ) -> None:
        """out float32 [T, attention_size] = causal attention of queries at start..start+T-1 over the caches.

        q float32 [T, ldq >= attention_size], queries first (the fused qkv will do); scratch: ``workspace`` of
        ``attention_workspace_bytes`` or more.
        """
        args = self._attention_args
        tokens, ldq = shape_2d(q, "attention.q")
        if ldq < heads.attention_size:
            raise NativeError("too few columns", where="attention.q", got=ldq, limit=heads.attention_size)
        capacity, kv_dtype = _cache_shape(k_cache, heads)
        caches = (heads.num_kv_heads, capacity, heads.head_dim)
        args.q, args.ldq = pointer(q, (tokens, ldq), F32, "attention.q"), ldq
        args.tokens, args.start, args.scale = tokens, start, scale
        args.num_heads, args.num_kv_heads, args.head_dim = heads.num_heads, heads.num_kv_heads, heads.head_dim
        args.k_cache = pointer(k_cache, caches, k_cache.dtype, "attention.k_cache")
        args.v_cache = pointer(v_cache, caches, k_cache.dtype, "attention.v_cache")
        args.capacity, args.kv_dtype = capacity, kv_dtype
        args.out = out_pointer(out, (tokens, heads.attention_size), F32, "attention.out")
        args.workspace = out_pointer(scratch, scratch.shape, U8, "attention.scratch")
        args.workspace_bytes = scratch.nbytes
        check(self._attention(self.pool.handle, ctypes.byref(args)), "krasis_attention")

    def moe(
        self,
        blob: Array,
        expert_stride_bytes: int,
        tiles: str,
        acts: Acts,
        ids: Array,
        weights: Array,
        out: Array,
        intermediate: int,
        num_experts: int,
        scratch: Array,
    ) -> int:
        """out float32 [T, hidden] += the routed experts of one layer. Returns how many pairs ran.

        blob: uint8, num_experts records of expert_stride_bytes; tiles ``q8`` or ``i4``; acts [T, hidden];
        ids int32 and weights float32 [T, top_k]; scratch: ``workspace`` of ``moe_workspace_bytes`` or more.
        """
        args, hidden = self._moe_args, acts.k
        tokens, top_k = shape_2d(ids, "moe.ids")
        _check_blob(blob, expert_stride_bytes, tiles, hidden, intermediate, num_experts)
        if tokens != acts.tokens:
            raise NativeError("ids do not fit acts", where="moe.ids", got=tokens, limit=acts.tokens)
        args.blob = pointer(blob, blob.shape, U8, "moe.blob")
        args.expert_stride_bytes, args.tiles = expert_stride_bytes, TILE_CODES[tiles]
        args.num_experts, args.hidden, args.intermediate, args.top_k = (
            num_experts,
            hidden,
            intermediate,
            top_k,
        )
        args.acts = ctypes.addressof(acts._struct)
        args.ids = pointer(ids, (tokens, top_k), I32, "moe.ids")
        args.weights = pointer(weights, (tokens, top_k), F32, "moe.weights")
        args.out = out_pointer(out, (tokens, hidden), F32, "moe.out")
        args.workspace = out_pointer(scratch, scratch.shape, U8, "moe.scratch")
        args.workspace_bytes = scratch.nbytes
        self._executed.value = 0
        check(self._moe(self.pool.handle, ctypes.byref(args)), "krasis_moe")
        return self._executed.value


def _cache_shape(k_cache: Array, heads: Heads) -> tuple[int, int]:
    """(capacity, dtype code) of a cache; its other dimensions are checked by ``pointer``."""
    shape, kind = k_cache.shape, k_cache.dtype
    if len(shape) != 3:
        raise NativeError("cache must have three dimensions", where="k_cache", got=f"shape {shape}")
    if kind is F32 or kind == F32:
        return shape[1], 0
    if kind == F16:
        return shape[1], 2
    raise NativeError("cache must be float32 or float16", where="k_cache", got=kind)


def _check_blob(
    blob: Array, stride_bytes: int, tiles: str, hidden: int, intermediate: int, num_experts: int
) -> None:
    if tiles not in TILE_CODES:
        raise NativeError("unknown tiles", where="moe.tiles", got=tiles, limit=", ".join(TILE_CODES))
    need_bytes = 3 * hidden * intermediate // (TILE_ROWS * BLOCK_K) * TILE_BYTES[tiles]
    if stride_bytes < need_bytes:
        raise NativeError("expert record is too short", where="moe", got=stride_bytes, limit=need_bytes)
    if num_experts * stride_bytes > blob.nbytes:
        raise NativeError(
            "blob is too short", where="moe.blob", got=blob.nbytes, limit=num_experts * stride_bytes
        )
