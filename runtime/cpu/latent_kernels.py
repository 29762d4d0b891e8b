"""Checked calls of the native functions of latent attention: see ``kernels``."""

from __future__ import annotations

import ctypes

from krasis.formats.errors import NativeError
from krasis.formats.layouts import STRIP_ROWS
from krasis.formats.models.mixers import LatentAttention
from krasis.runtime.cpu.acts import Acts
from krasis.runtime.cpu.heads import Rotation
from krasis.runtime.cpu.kernels import Kernels
from krasis.runtime.cpu.native import KV_CODES, STYLE_CODES, LatentArgs
from krasis.runtime.cpu.native_arrays import F32, I8, Array, out_pointer, pointer, shape_2d
from krasis.runtime.cpu.spans import LayerCache, Spans


def latent_store(
    kernels: Kernels,
    q: Array,
    kv: Array,
    mixer: LatentAttention,
    norm: Array,
    rotation: Rotation | None,
    spans: Spans,
    cache: LayerCache,
    acts: Acts,
    queries: Array,
) -> None:
    """The normed latent and the turned rest of kv float32 [T, >= kv_rank + rope_dim] go to the layer's part
    of the memory of the spans' slots.

    q float32 [T, >= heads * (nope_dim + rope_dim)]: acts [T * heads, nope_dim] of the first channels of each
    head; the turned others become the last of each head of queries float32 [T, heads * (kv_rank + rope_dim)].
    """
    where, width = "latent_store", mixer.kv_rank + mixer.rope_dim
    (tokens, ldq), ldkv = shape_2d(q, f"{where}.q"), shape_2d(kv, f"{where}.kv")[1]
    if acts.tokens != tokens * mixer.heads or acts.k != mixer.nope_dim:
        raise NativeError("acts do not fit q", where=where, got=acts.q.shape, limit=(tokens * mixer.heads,))
    spans.check_cache(cache, 1, width, where, has_values=False)
    args = LatentArgs(
        q=pointer(q, (tokens, ldq), F32, f"{where}.q"),
        kv=pointer(kv, (tokens, ldkv), F32, f"{where}.kv"),
        ldq=ldq,
        ldkv=ldkv,
        tokens=tokens,
        num_heads=mixer.heads,
        nope_dim=mixer.nope_dim,
        rope_dim=mixer.rope_dim,
        kv_rank=mixer.kv_rank,
        norm=pointer(norm, (mixer.kv_rank,), F32, f"{where}.norm"),
        eps=mixer.latent_eps,
        spans=spans.address,
        num_spans=spans.max_spans,
        keys_offset_bytes=cache.keys_offset_bytes,
        values_offset_bytes=cache.values_offset_bytes,
        capacity=cache.capacity,
        kv_dtype=KV_CODES[cache.dtype],
        acts=acts.address,
        queries=out_pointer(queries, (tokens, mixer.heads * width), F32, f"{where}.queries"),
    )
    if rotation is not None:
        tables = shape_2d(rotation.cos, f"{where}.cos")
        args.cos = pointer(rotation.cos, tables, F32, f"{where}.cos")
        args.sin = pointer(rotation.sin, tables, F32, f"{where}.sin")
        args.max_positions, args.rotary_dims = tables[0], 2 * tables[1]
        args.rope_style = STYLE_CODES[rotation.style]
    if mixer.temperature is not None:
        args.temperature_scale, args.temperature_shift = mixer.temperature.scale, mixer.temperature.shift
        args.temperature_period = mixer.temperature.period
    keeps = (q, kv, norm, rotation, spans, acts, queries)
    kernels.call("krasis_latent_store", (ctypes.byref(args),), *keeps)


def gemm_int8_heads(
    kernels: Kernels, acts: Acts, weight: Array, scales: Array, num_heads: int, out: Array, head_columns: int
) -> None:
    """Of each head's rows acts [T * num_heads, k] the product with the head's rows of a weight.

    weight int8 [num_heads * n / 32, k / 4, 32, 4], scales float32 [num_heads * n]; out float32
    [T, num_heads * head_columns], of which the first n of each head are written.
    """
    where = "gemm_int8_heads"
    rows = scales.shape[0]
    n, tokens = rows // num_heads, acts.tokens // num_heads
    if rows % num_heads or acts.tokens % num_heads or n > head_columns:
        raise NativeError("heads do not fit", where=where, got=(rows, acts.tokens), limit=num_heads)
    columns = num_heads * head_columns
    arguments = (
        acts.ref,
        pointer(weight, (rows // STRIP_ROWS, acts.k // 4, STRIP_ROWS, 4), I8, f"{where}.weight"),
        pointer(scales, (rows,), F32, f"{where}.scales"),
        num_heads,
        n,
        out_pointer(out, (tokens, columns), F32, f"{where}.out"),
        head_columns,
        columns,
    )
    kernels.call("krasis_gemm_int8_heads", arguments, acts, weight, scales, out)
