"""Wrappers of the kernels of latent attention: what is kept of a token, products of heads, attention over
latents.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch

from krasis.formats.layouts import STRIP_ROWS
from krasis.formats.models.mixers import LatentAttention
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I32,
    I64,
    U8,
    aligned,
    matrix,
    pointer,
    require,
    row_pointer,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.attention_rows import ROW_WORDS, CachePlace, CacheRows
from krasis.runtime.gpu.kernels.launcher import Launcher
from krasis.runtime.gpu.kernels.native import Int8HeadsArgs, LatentArgs, LatentAttentionArgs


@dataclass(frozen=True, slots=True)
class LatentForm:
    """A layer of latent attention. norm [kv_rank]: of the latents. cos, sin float32 [positions,
    rope_dim / 2]; None without rotation."""

    mixer: LatentAttention
    norm: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None

    @property
    def width(self) -> int:
        """Channels that are kept of a token."""
        return self.mixer.kv_rank + self.mixer.rope_dim

    @property
    def head_dim(self) -> int:
        """Channels of a head of the queries."""
        return self.mixer.nope_dim + self.mixer.rope_dim

    @property
    def query_size(self) -> int:
        """Channels of all heads' queries."""
        return self.mixer.heads * self.head_dim


class LatentKernels(Launcher):
    """T: rows of a call; T = 0 launches nothing. Places are those of caches [1, capacity, kv_rank +
    rope_dim]; their values are not looked at."""

    def latent_store(
        self,
        stream: Stream,
        q: torch.Tensor,
        kv: torch.Tensor,
        form: LatentForm,
        place: CachePlace | CacheRows,
    ) -> None:
        """Latents and shared keys of kv float32 [T, >= kv_rank + rope_dim] go into the cache, normed and
        turned; q [T, >= heads * head_dim], of the cache's type, is turned in place."""
        where, tokens, mixer = "latent_store", len(q), form.mixer
        q_pointer, q_stride = row_pointer(q, matrix(q, f"{where}.q"), HALVES, f"{where}.q")
        kv_pointer, kv_stride = row_pointer(kv, matrix(kv, f"{where}.kv"), F32, f"{where}.kv")
        require(len(kv) == tokens, "rows differ", f"{where}.kv", len(kv), tokens)
        args = LatentArgs(
            q=q_pointer,
            kv=kv_pointer,
            q_stride=q_stride,
            kv_stride=kv_stride,
            tokens=tokens,
            num_heads=mixer.heads,
            nope_dim=mixer.nope_dim,
            rope_dim=mixer.rope_dim,
            kv_rank=mixer.kv_rank,
            norm=pointer(form.norm, (mixer.kv_rank,), FLOATS, f"{where}.norm"),
            dtype=CODES[q.dtype],
            norm_dtype=CODES[form.norm.dtype],
            eps=mixer.latent_eps,
        )
        reads = [q, kv, form.norm, *_set_rotation(args, form, where)]
        if mixer.temperature is not None:
            args.temperature_scale, args.temperature_shift = mixer.temperature.scale, mixer.temperature.shift
            args.temperature_period = mixer.temperature.period
        if isinstance(place, CacheRows):
            _set_rows(args, place, tokens, where)
            reads.append(place.table)
            writes = [q, *place.memory]
        else:
            args.cache, args.capacity = _cache(place, form, q, where), place.keys.shape[1]
            args.start = place.start
            writes = [q, place.keys[:, place.start : place.start + tokens]]
        if tokens:
            self.submit(stream, where, (byref(args),), reads, writes)

    def int8_heads(
        self, stream: Stream, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor
    ) -> None:
        """out [T, heads, n] = x [T, heads, k] x W_h^T of each head; W int8 [heads * n / 32, k / 4, 32, 4]
        with float32 scales. x and out of one 16-bit type, rows and heads may lie apart. k % 64 == 0."""
        where, (tokens, heads, k), n = "int8_heads", x.shape, out.shape[2]
        require(k % 64 == 0 and n % STRIP_ROWS == 0, "sizes do not fit tiles", where, (k, n), "64, 32")
        require(
            out.shape[:2] == x.shape[:2] and out.dtype == x.dtype and x.dtype in HALVES,
            "out does not fit x",
            where,
            f"{out.dtype} {list(out.shape)}",
            f"{x.dtype} {list(x.shape)}",
        )
        for name, tensor in (("x", x), ("out", out)):
            require(tensor.stride(2) == 1, "channels are apart", f"{where}.{name}", tensor.stride(), 1)
        args = Int8HeadsArgs(
            x=aligned(x.data_ptr(), f"{where}.x"),
            x_stride=x.stride(0),
            x_head_stride=x.stride(1),
            tokens=tokens,
            num_heads=heads,
            k=k,
            n=n,
            dtype=CODES[x.dtype],
            weight=vector_pointer(
                codes, (heads * n // STRIP_ROWS, k // 4, STRIP_ROWS, 4), I8, f"{where}.codes"
            ),
            scales=pointer(scales, (heads * n,), F32, f"{where}.scales"),
            out=aligned(out.data_ptr(), f"{where}.out"),
            out_stride=out.stride(0),
            out_head_stride=out.stride(1),
        )
        if tokens:
            self.submit(stream, where, (byref(args),), (x, codes, scales), (out,))

    def latent_attention(
        self,
        stream: Stream,
        queries: torch.Tensor,
        rest: torch.Tensor,
        form: LatentForm,
        place: CachePlace | CacheRows,
        workspace: torch.Tensor,
        splits: int,
        chosen: torch.Tensor | None = None,
    ) -> None:
        """queries [T, heads, kv_rank], taken to the latents = attention of each row over its cache up to its
        own position. rest [T, heads, rope_dim]: the queries' turned channels, rows and heads may lie apart.
        workspace: uint8; for so many splits. chosen int32 [T, budget]: of ``choose``, what rows attend to."""
        where, mixer, tokens = "latent_attention", form.mixer, len(queries)
        shape = (tokens, mixer.heads, mixer.kv_rank)
        address = vector_pointer(queries, shape, HALVES, f"{where}.queries")
        require(
            tuple(rest.shape) == (tokens, mixer.heads, mixer.rope_dim) and rest.dtype == queries.dtype,
            "the queries' parts differ",
            where,
            f"{rest.dtype} {list(rest.shape)}",
            f"{queries.dtype} {[tokens, mixer.heads, mixer.rope_dim]}",
        )
        args = LatentAttentionArgs(
            q_latent=address,
            q_rope=rest.data_ptr(),
            out=address,
            q_stride=rest.stride(0),
            q_head_stride=rest.stride(1),
            num_rows=tokens,
            num_heads=mixer.heads,
            kv_rank=mixer.kv_rank,
            rope_dim=mixer.rope_dim,
            splits=splits,
            workspace=vector_pointer(workspace, (workspace.numel(),), U8, f"{where}.workspace"),
            workspace_bytes=workspace.numel(),
            dtype=CODES[queries.dtype],
            scale=mixer.scale,
        )
        reads = [queries, rest]
        if chosen is not None:
            budget = matrix(chosen, f"{where}.chosen")[1]
            args.chosen = pointer(chosen, (tokens, budget), I32, f"{where}.chosen")
            args.budget = budget
            reads.append(chosen)
        if isinstance(place, CacheRows):
            _set_rows(args, place, tokens, where)
            reads += [place.table, *place.memory]
        else:
            args.cache, args.capacity = _cache(place, form, queries, where), place.keys.shape[1]
            args.start = place.start
            reads.append(place.keys[:, : place.start + tokens])
        if tokens:
            self.submit(stream, where, (byref(args),), reads, (queries, workspace))


def _set_rotation(args: LatentArgs, form: LatentForm, where: str) -> list[torch.Tensor]:
    if form.cos is None or form.sin is None:
        return []
    positions, pairs = matrix(form.cos, f"{where}.cos")
    args.cos = pointer(form.cos, (positions, pairs), F32, f"{where}.cos")
    args.sin = pointer(form.sin, (positions, pairs), F32, f"{where}.sin")
    args.max_positions, args.rotary_dims = positions, 2 * pairs
    args.interleaved = form.mixer.rope is not None and form.mixer.rope.style == "interleaved"
    return [form.cos, form.sin]


def _set_rows(args: LatentArgs | LatentAttentionArgs, place: CacheRows, tokens: int, where: str) -> None:
    require(place.num_rows >= tokens, "fewer places than rows", where, place.num_rows, tokens)
    args.rows = pointer(place.table, (place.num_rows, ROW_WORDS), I64, f"{where}.rows")
    args.keys_offset = aligned(place.keys_offset, f"{where}.keys")
    args.capacity = place.capacity


def _cache(place: CachePlace, form: LatentForm, rows: torch.Tensor, where: str) -> int:
    require(place.keys.dim() == 3, "cache must have three dimensions", where, list(place.keys.shape), 3)
    return vector_pointer(place.keys, (1, place.keys.shape[1], form.width), (rows.dtype,), f"{where}.cache")
