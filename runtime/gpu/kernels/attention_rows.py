"""Wrappers of the kernels around attention: what happens to q, k and v, and attention of few queries."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass
from typing import Literal

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.kernels import Heads
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODE_OF_INT8,
    CODES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I64,
    U8,
    aligned,
    matrix,
    optional_pointer,
    pointer,
    require,
    row_pointer,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.launcher import Launcher, Tensors, present
from krasis.runtime.gpu.kernels.native import AttentionArgs, QkvArgs

_WORD = (1,)
NORM_CODES = {"head": 0, "flat": 1, "head_after_rope": 2}
ROW_WORDS = 3
"""Of ``krasis_cuda_row``: the position, the addresses of the slot's keys and values."""


@dataclass(frozen=True, slots=True)
class QkvForm:
    """What a layer does to q, k and v: bias, norm, clip, rotation, in this order; the norm may be last.

    cos, sin float32 [positions, rotary dims / 2], of the first channels of each head. q_norm, k_norm
    [head_dim], or, if ``flat``, [num_heads * head_dim] and [num_kv_heads * head_dim]; None: no norm. bias
    float32 [qkv_size] or None. clip: to +-clip, 0 for none. interleaved: pairs are neighbours, not halves.
    value_norm: v is normed, too, without weights.
    """

    eps: float
    cos: torch.Tensor
    sin: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    norm: Literal["head", "flat", "head_after_rope"] = "head"
    bias: torch.Tensor | None = None
    clip: float = 0.0
    interleaved: bool = False
    value_norm: bool = False


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Rows at positions start.. of one sequence's keys and values [num_kv_heads, capacity, head_dim].

    position int64 [1] on the device: read in place of start when the kernel runs (graphs). scales: of int8
    keys and of values, float32 [num_kv_heads, capacity, 1], right behind them in memory.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: int = 0
    position: torch.Tensor | None = None
    scales: tuple[torch.Tensor, torch.Tensor] | None = None

    def seen(self, span: slice) -> list[torch.Tensor]:
        """What it keeps of some positions."""
        return [kept[:, span] for kept in (self.keys, self.values, *(self.scales or ()))]


@dataclass(frozen=True, slots=True)
class CacheRows:
    """Rows of several sequences, each at its own position of its own slot; read when a kernel runs.

    table int64 [rows, 3] on the device: position (below 0: the row belongs to nobody), then the addresses of
    the slot's keys and values, which lie in memory. keys_offset, values_offset: bytes to a layer's part
    [num_kv_heads, capacity, head_dim]. has_scales: it is int8, its scales right behind it. ring: places of a
    head instead, position p at p % ring; 0 for none.
    """

    table: torch.Tensor
    memory: Tensors
    keys_offset: int
    values_offset: int
    capacity: int
    has_scales: bool = False
    ring: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return len(self.table)


class AttentionKernels(Launcher):
    """T: rows of a call; T = 0 launches nothing. All tensors on the device, contiguous unless said."""

    def qk_norm_rope_store(
        self, stream: Stream, qkv: torch.Tensor, heads: Heads, form: QkvForm, place: CachePlace | CacheRows
    ) -> None:
        """Brings q into its form in place; k, and v, into theirs in the caches.

        qkv [T, heads.qkv_size] and the caches of one 16-bit type, or the caches int8 with scales.
        """
        where, tokens = "qk_norm_rope_store", matrix(qkv, "qk_norm_rope_store.qkv")[0]
        args = QkvArgs(
            qkv=vector_pointer(qkv, (tokens, heads.qkv_size), HALVES, f"{where}.qkv"),
            tokens=tokens,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            dtype=CODES[qkv.dtype],
        )
        reads = [qkv, *_set_form(args, form, heads, where)]
        # Only its queries are written; named as a whole, qkv is one range of bytes instead of one a token.
        writes = [qkv]
        if isinstance(place, CacheRows):
            require(place.num_rows >= tokens, "fewer places than rows", where, place.num_rows, tokens)
            args.rows = pointer(place.table, (place.num_rows, ROW_WORDS), I64, f"{where}.rows")
            args.keys_offset = aligned(place.keys_offset, f"{where}.keys")
            args.values_offset = aligned(place.values_offset, f"{where}.values")
            args.capacity, args.kv_dtype = place.capacity, CODE_OF_INT8 if place.has_scales else 0
            args.ring = place.ring
            reads += [place.table, form.cos, form.sin]
            writes += place.memory
        else:
            cells = _set_place(args, place, heads, qkv, tokens, where)
            reads += present(place.position, form.cos[cells], form.sin[cells])
            writes += place.seen(cells)
        if tokens:
            self.submit(stream, where, (byref(args),), reads, writes)

    def attention_workspace_bytes(self, num_rows: int, num_heads: int, head_dim: int, capacity: int) -> int:
        """Workspace of ``attention_decode``."""
        num_bytes = self.function("attention_workspace_bytes")(num_rows, num_heads, head_dim, capacity)
        require(num_bytes >= 0, "sizes are out of their domain", "attention_workspace_bytes", num_bytes, 0)
        return num_bytes

    def attention_workspace(self, heads: Heads, capacity: int, num_rows: int = 1) -> torch.Tensor:
        """Workspace of ``attention_decode`` for caches of that capacity: uint8, on the device."""
        num_bytes = self.attention_workspace_bytes(num_rows, heads.num_heads, heads.head_dim, capacity)
        return self.device.empty((num_bytes,), torch.uint8)

    def attention_decode(
        self,
        stream: Stream,
        q: torch.Tensor,
        heads: Heads,
        place: CachePlace | CacheRows,
        scale: float,
        out: torch.Tensor,
        workspace: torch.Tensor,
        window: int = 0,
        sinks: torch.Tensor | None = None,
        num_positions: int | None = None,
    ) -> None:
        """out [T, attention_size] = attention of each row's query over its cache up to its own position.

        q [T, attention_size], out and the caches of one 16-bit type, or the caches int8 with scales; rows of
        q and out may lie apart. place: rows, or the one row of a sequence, whose position is on the device.
        window: how many positions are seen, 0 for all. sinks float32 [num_heads]: one more logit a head.
        num_positions: how many positions of the one row are read at most, if the host knows: for the double's
        checks.
        """
        where = "attention_decode"
        tokens, size = len(q), heads.attention_size
        q_pointer, q_stride = row_pointer(q, (tokens, size), HALVES, f"{where}.q")
        out_pointer, out_stride = row_pointer(out, (tokens, size), (q.dtype,), f"{where}.out")
        args = AttentionArgs(
            q=q_pointer,
            out=out_pointer,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            dtype=CODES[q.dtype],
            scale=scale,
            workspace=vector_pointer(workspace, (workspace.numel(),), U8, f"{where}.workspace"),
            workspace_bytes=workspace.numel(),
            num_rows=tokens,
            q_stride=q_stride,
            out_stride=out_stride,
            sinks=optional_pointer(sinks, (heads.num_heads,), F32, f"{where}.sinks"),
            window=window,
        )
        if isinstance(place, CacheRows):
            require(place.num_rows >= tokens, "fewer places than rows", where, place.num_rows, tokens)
            args.rows = pointer(place.table, (place.num_rows, ROW_WORDS), I64, f"{where}.rows")
            args.keys_offset = aligned(place.keys_offset, f"{where}.keys")
            args.values_offset = aligned(place.values_offset, f"{where}.values")
            args.capacity, args.kv_dtype = place.capacity, CODE_OF_INT8 if place.has_scales else 0
            args.ring = place.ring
            reads = present(q, place.table, sinks, *place.memory)
        else:
            if place.position is None or tokens != 1:
                raise NativeError("needs one row, its position on the device", where=where, got=tokens)
            _set_caches(args, place, heads, q, where)
            args.position = pointer(place.position, _WORD, I64, f"{where}.position")
            span = slice(num_positions)
            reads = present(q, *place.seen(span), place.position, sinks)
        if tokens:
            self.submit(stream, where, (byref(args),), reads, (out, workspace))


def _set_form(args: QkvArgs, form: QkvForm, heads: Heads, where: str) -> list[torch.Tensor]:
    """What the kernel reads besides the tables."""
    q_size, k_size = heads.attention_size, heads.num_kv_heads * heads.head_dim
    norm = form.k_norm if form.q_norm is None else form.q_norm
    q_shape, k_shape = (
        ((q_size,), (k_size,)) if form.norm == "flat" else ((heads.head_dim,), (heads.head_dim,))
    )
    positions, pairs = matrix(form.cos, f"{where}.cos")
    kinds = FLOATS if norm is None else (norm.dtype,)
    args.q_norm = optional_pointer(form.q_norm, q_shape, FLOATS, f"{where}.q_norm")
    args.k_norm = optional_pointer(form.k_norm, k_shape, kinds, f"{where}.k_norm")
    args.norm_dtype = 0 if norm is None else CODES[norm.dtype]
    args.norm_kind = NORM_CODES[form.norm]
    args.eps, args.clip = form.eps, form.clip
    args.cos = pointer(form.cos, (positions, pairs), F32, f"{where}.cos")
    args.sin = pointer(form.sin, (positions, pairs), F32, f"{where}.sin")
    args.max_positions, args.rotary_dims = positions, 2 * pairs
    args.bias = optional_pointer(form.bias, (heads.qkv_size,), F32, f"{where}.bias")
    args.interleaved = 1 if form.interleaved else 0
    args.shared_kv, args.value_norm = int(heads.shared_kv), int(form.value_norm)
    return present(form.q_norm, form.k_norm, form.bias)


def _set_caches(
    args: QkvArgs | AttentionArgs, place: CachePlace, heads: Heads, rows: torch.Tensor, where: str
) -> None:
    keys, values = place.keys, place.values
    require(keys.dim() == 3, "cache must have three dimensions", f"{where}.keys", list(keys.shape), 3)
    capacity = keys.shape[1]
    caches = (heads.num_kv_heads, capacity, heads.head_dim)
    kinds = (rows.dtype,) if place.scales is None else I8
    args.k_cache = vector_pointer(keys, caches, kinds, f"{where}.keys")
    args.v_cache = vector_pointer(values, caches, kinds, f"{where}.values")
    args.capacity, args.kv_dtype = capacity, 0 if place.scales is None else CODE_OF_INT8
    for codes, scales in zip((keys, values), place.scales or (), strict=False):
        at = pointer(scales, (*caches[:2], 1), F32, f"{where}.scales")
        end = codes.data_ptr() + codes.nbytes
        require(at == end, "scales lie elsewhere than behind the codes", where, at, end)


def _set_place(
    args: QkvArgs, place: CachePlace, heads: Heads, qkv: torch.Tensor, tokens: int, where: str
) -> slice:
    """The positions that the kernel may write to."""
    _set_caches(args, place, heads, qkv, where)
    if place.position is not None:
        args.start_device = pointer(place.position, _WORD, I64, f"{where}.position")
        return slice(None)
    end, limit = place.start + tokens, min(args.capacity, args.max_positions)
    if not (place.start >= 0 and end <= limit):
        raise NativeError("positions out of range", where=where, got=(place.start, end), limit=limit)
    args.start = place.start
    return slice(place.start, end)
