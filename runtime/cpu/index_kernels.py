"""Checked calls of the native functions of an index over tokens: see ``kernels``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from krasis.formats.errors import NativeError
from krasis.formats.limits import align_up
from krasis.formats.models.selection import INDEX_NORM_EPS, Selection
from krasis.runtime.cpu.heads import Heads, Rotation
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native import KV_CODES, STYLE_CODES, AttentionArgs, ChooseArgs, IndexArgs
from krasis.runtime.cpu.native_arrays import F32, I32, U8, Array, out_pointer, pointer, shape_2d
from krasis.runtime.cpu.spans import ELEMENT_BYTES, LayerCache, Spans
from krasis.runtime.cpu.workspaces import attention_workspace_bytes

_ROUND_ROWS = 16  # whose scores, or chosen keys, lie side by side
_BLOCK_KEYS, _LINE_BYTES = 64, 64
_SCALES_BYTES = 8  # of a latent's two parts in 8 bits


@dataclass(frozen=True, slots=True)
class IndexNorm:
    """The layer norm of an index's keys: float32 [dim] each. positions: float32 [block, dim], what is added
    to the gates of a pool's tokens, None where tokens are scored.
    """

    weight: Array
    bias: Array
    positions: Array | None = None


def index_store(
    kernels: Kernels,
    k: Array,
    q: Array | None,
    index: Selection,
    norm: IndexNorm,
    rotation: Rotation | None,
    spans: Spans,
    cache: LayerCache,
    gates: Array | None = None,
) -> None:
    """k float32 [T, dim], normed and its first channels turned, goes to the layer's values in the memory of
    the spans' slots, with gates float32 [T, dim] where the index pools, and the keys of pools that are whole
    then; q float32 [T, heads * dim] is turned in place.
    """
    where, tokens = "index_store", shape_2d(k, "index_store.k")[0]
    _check_keys(spans, cache, index, where)
    args = IndexArgs(
        k=pointer(k, (tokens, index.dim), F32, f"{where}.k"),
        q=None if q is None else out_pointer(q, (tokens, index.heads * index.dim), F32, f"{where}.q"),
        tokens=tokens,
        heads=index.heads,
        dim=index.dim,
        norm=pointer(norm.weight, (index.dim,), F32, f"{where}.norm"),
        bias=pointer(norm.bias, (index.dim,), F32, f"{where}.bias"),
        eps=INDEX_NORM_EPS,
        block=index.block,
    )
    if gates is not None and norm.positions is not None:
        args.gates = pointer(gates, (tokens, index.dim), F32, f"{where}.gates")
        args.positions = pointer(norm.positions, (index.block, index.dim), F32, f"{where}.positions")
    if rotation is not None:
        tables = shape_2d(rotation.cos, f"{where}.cos")
        args.cos = pointer(rotation.cos, tables, F32, f"{where}.cos")
        args.sin = pointer(rotation.sin, tables, F32, f"{where}.sin")
        args.max_positions, args.rotary_dims = tables[0], 2 * tables[1]
        args.rope_style = STYLE_CODES[rotation.style]
    _place(args, spans, cache)
    kernels.call("krasis_index_store", (ctypes.byref(args),), k, q, norm, rotation, spans, gates)


def choose(
    kernels: Kernels,
    q: Array,
    weights: Array,
    index: Selection,
    spans: Spans,
    cache: LayerCache,
    chosen: Array,
    scratch: Array,
) -> None:
    """chosen int32 [T, most_keys]: the positions that each row attends to, ascending; as many as it sees, if
    these are fewer. q float32 [T, heads * dim], turned; weights float32 [T, heads]; scratch: ``workspace`` of
    ``choose_workspace_bytes`` or more.
    """
    tokens = shape_2d(q, "choose.q")[0]
    _check_keys(spans, cache, index, "choose")
    args = ChooseArgs(
        q=pointer(q, (tokens, index.heads * index.dim), F32, "choose.q"),
        weights=pointer(weights, (tokens, index.heads), F32, "choose.weights"),
        tokens=tokens,
        heads=index.heads,
        dim=index.dim,
        chosen=out_pointer(chosen, (tokens, index.most_keys), I32, "choose.chosen"),
        budget=index.budget,
        block=index.block,
        workspace=out_pointer(scratch, scratch.shape, U8, "choose.scratch"),
        workspace_bytes=scratch.nbytes,
    )
    _place(args, spans, cache)
    kernels.call("krasis_choose", (ctypes.byref(args),), q, weights, spans, chosen, scratch)


def attention_chosen(
    kernels: Kernels,
    q: Array,
    heads: Heads,
    spans: Spans,
    cache: LayerCache,
    scale: float,
    chosen: Array,
    out: Array,
    scratch: Array,
    block: int = 1,
) -> None:
    """``Kernels.attention`` of latents over chosen positions alone, int32 [T, most_keys] of ``choose``, with
    the index's block. scratch: ``workspace`` of ``chosen_workspace_bytes`` or more.
    """
    where, (tokens, ldq) = "attention_chosen", shape_2d(q, "attention_chosen.q")
    most_keys = shape_2d(chosen, f"{where}.chosen")[1]
    if heads.latent_values is None or heads.num_kv_heads != 1 or ldq < heads.attention_size:
        raise NativeError("these are no heads over latents", where=where, got=heads)
    spans.check_cache(cache, 1, heads.head_dim, where, has_values=False)
    args = AttentionArgs(
        q=pointer(q, (tokens, ldq), F32, f"{where}.q"),
        ldq=ldq,
        tokens=tokens,
        num_heads=heads.num_heads,
        num_kv_heads=1,
        head_dim=heads.head_dim,
        scale=scale,
        out=out_pointer(out, (tokens, heads.output_size), F32, f"{where}.out"),
        workspace=out_pointer(scratch, scratch.shape, U8, f"{where}.scratch"),
        workspace_bytes=scratch.nbytes,
        value_dim=heads.latent_values,
    )
    _place(args, spans, cache)
    address = pointer(chosen, (tokens, most_keys), I32, f"{where}.chosen")
    arguments = (ctypes.byref(args), address, most_keys - block + 1, block)
    kernels.call("krasis_attention_chosen", arguments, q, spans, chosen, out, scratch)


def choose_workspace_bytes(num_rows: int, longest_end: int) -> int:
    """Enough for ``choose`` with up to num_rows rows, and spans that end by longest_end."""
    return min(num_rows, _ROUND_ROWS) * align_up(longest_end, _BLOCK_KEYS) * F32.itemsize


def chosen_workspace_bytes(num_rows: int, most_keys: int, heads: Heads, kv_dtype: str) -> int:
    """Enough for ``attention_chosen`` with up to num_rows rows of so many keys."""
    row_bytes = heads.head_dim * ELEMENT_BYTES[kv_dtype] + (_SCALES_BYTES if kv_dtype == "int8" else 0)
    attending = attention_workspace_bytes(1, most_keys, heads)
    return min(num_rows, _ROUND_ROWS) * (
        align_up(most_keys * row_bytes, _LINE_BYTES) + align_up(attending, _LINE_BYTES)
    )


def _check_keys(spans: Spans, cache: LayerCache, index: Selection, where: str) -> None:
    """Raises NativeError if the layer's index keys end outside of the slots' values."""
    parts = index.key_parts
    begin, size_bytes = cache.values_offset_bytes, cache.size_bytes(1, sum(parts), len(parts))
    if begin < 0 or begin + size_bytes > spans.values_bytes:
        raise NativeError(
            "the layer's index keys end outside of the slot's memory",
            where=f"{where}.cache",
            got=f"{begin} + {size_bytes} bytes",
            limit=f"{spans.values_bytes} bytes",
        )


def _place(args: IndexArgs | ChooseArgs | AttentionArgs, spans: Spans, cache: LayerCache) -> None:
    args.spans, args.num_spans = spans.address, spans.max_spans
    args.keys_offset_bytes, args.values_offset_bytes = cache.keys_offset_bytes, cache.values_offset_bytes
    args.capacity, args.kv_dtype = cache.capacity, KV_CODES[cache.dtype]
