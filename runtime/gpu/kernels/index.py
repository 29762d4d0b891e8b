"""Wrappers of the kernels of an index over tokens (DSA): what it keeps of a token, and its choice."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch

from krasis.formats.limits import align_up
from krasis.formats.models.selection import INDEX_NORM_EPS, Selection
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    HALVES,
    I32,
    I64,
    aligned,
    matrix,
    pointer,
    require,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.attention_rows import ROW_WORDS, CachePlace, CacheRows
from krasis.runtime.gpu.kernels.launcher import Launcher
from krasis.runtime.gpu.kernels.native import ChooseArgs, IndexArgs

_COLUMNS = 4  # scores of a row begin aligned


@dataclass(frozen=True, slots=True)
class IndexForm:
    """A layer's index. norm [dim], bias float32 [dim]: of keys. cos, sin float32 [positions, rotated
    channels / 2]; None without rotation."""

    index: Selection
    norm: torch.Tensor
    bias: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None


def score_columns(num_keys: int) -> int:
    """Floats of a row's scores of so many keys."""
    return align_up(num_keys, _COLUMNS)


class IndexKernels(Launcher):
    """T: rows of a call; T = 0 launches nothing. Places are those of latents, whose values [1, capacity, dim]
    are the index's keys."""

    def index_store(
        self,
        stream: Stream,
        k: torch.Tensor,
        q: torch.Tensor | None,
        form: IndexForm,
        place: CachePlace | CacheRows,
        dtype: torch.dtype,
    ) -> None:
        """Keys of k float32 [T, dim] go to their place, normed and turned; q float32 [T, heads * dim] is
        turned in place. dtype: of the place."""
        where, index, tokens = "index_store", form.index, len(k)
        args = IndexArgs(
            k=pointer(k, (tokens, index.dim), F32, f"{where}.k"),
            tokens=tokens,
            heads=index.heads,
            dim=index.dim,
            norm=pointer(form.norm, (index.dim,), FLOATS, f"{where}.norm"),
            bias=pointer(form.bias, (index.dim,), F32, f"{where}.bias"),
            dtype=CODES[dtype],
            norm_dtype=CODES[form.norm.dtype],
            eps=INDEX_NORM_EPS,
        )
        reads, writes = [k, form.norm, form.bias], []
        if form.cos is not None and form.sin is not None:
            shape = matrix(form.cos, f"{where}.cos")
            args.cos = pointer(form.cos, shape, F32, f"{where}.cos")
            args.sin = pointer(form.sin, shape, F32, f"{where}.sin")
            args.max_positions, args.rotary_dims = shape[0], 2 * shape[1]
            args.interleaved = index.rope is not None and index.rope.style == "interleaved"
            reads += [form.cos, form.sin]
        if q is not None:
            args.q = pointer(q, (tokens, index.heads * index.dim), F32, f"{where}.q")
            writes.append(q)
        if isinstance(place, CacheRows):
            _set_rows(args, place, tokens, where)
            reads.append(place.table)
            writes += place.memory
        else:
            args.cache, args.capacity = _cache(place, index, dtype, where), place.values.shape[1]
            args.start = place.start
            writes.append(place.values[:, place.start : place.start + tokens])
        if tokens:
            self.submit(stream, where, (byref(args),), reads, writes)

    def choose(
        self,
        stream: Stream,
        q: torch.Tensor,
        weights: torch.Tensor,
        index: Selection,
        place: CachePlace | CacheRows,
        chosen: torch.Tensor,
        scores: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """chosen int32 [T, budget]: the positions that each row attends to, ascending; as many as it sees, if
        these are fewer. q float32 [T, heads * dim], turned; weights float32 [T, heads]. scores float32, flat:
        room for T rows of ``score_columns`` of the keys that any row may see."""
        where, tokens = "choose", len(q)
        columns = score_columns(place.capacity if isinstance(place, CacheRows) else place.start + tokens)
        needed = tokens * columns
        require(scores.numel() >= needed, "no room for scores", where, scores.numel(), needed)
        require(dtype in HALVES, "keys are of 16 bits", where, dtype, HALVES)
        args = ChooseArgs(
            q=pointer(q, (tokens, index.heads * index.dim), F32, f"{where}.q"),
            weights=pointer(weights, (tokens, index.heads), F32, f"{where}.weights"),
            tokens=tokens,
            heads=index.heads,
            dim=index.dim,
            budget=index.budget,
            dtype=CODES[dtype],
            chosen=pointer(chosen, (tokens, index.budget), I32, f"{where}.chosen"),
            scores=vector_pointer(scores, (scores.numel(),), F32, f"{where}.scores"),
            score_columns=columns,
        )
        reads = [q, weights]
        if isinstance(place, CacheRows):
            _set_rows(args, place, tokens, where)
            reads += [place.table, *place.memory]
        else:
            args.cache, args.capacity = _cache(place, index, dtype, where), place.values.shape[1]
            args.start = place.start
            reads.append(place.values[:, : place.start + tokens])
        if tokens:
            self.submit(stream, where, (byref(args),), reads, (chosen, scores[:needed]))


def _set_rows(args: IndexArgs | ChooseArgs, place: CacheRows, tokens: int, where: str) -> None:
    require(place.num_rows >= tokens, "fewer places than rows", where, place.num_rows, tokens)
    args.rows = pointer(place.table, (place.num_rows, ROW_WORDS), I64, f"{where}.rows")
    args.values_offset = aligned(place.values_offset, f"{where}.values")
    args.capacity = place.capacity


def _cache(place: CachePlace, index: Selection, dtype: torch.dtype, where: str) -> int:
    require(place.values.dim() == 3, "cache must have three dimensions", where, list(place.values.shape), 3)
    return vector_pointer(place.values, (1, place.values.shape[1], index.dim), (dtype,), f"{where}.cache")
