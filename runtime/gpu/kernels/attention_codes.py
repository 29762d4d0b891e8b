"""Causal attention of a chunk's queries over a cache of 8 bits: over floats of it, in a scratch buffer, some
heads at a time.

A float is a code times its scale, rounded to the queries' 16 bits, where decode multiplies by codes
themselves: the two differ by that rounding. What it costs, reading a byte and writing two for each channel of
a position, is little beside a chunk's attention, which reads these two for every block of queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.kernels import Heads
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.attention import attend

ITEM_BYTES = 2


@dataclass(frozen=True, slots=True)
class Seen:
    """Keys and values [num_kv_heads, capacity, head_dim], 16-bit, or int8 with scales, float32 [num_kv_heads,
    capacity, 1] each. scratch: uint8, room for the floats of a head of codes at least."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None
    scratch: torch.Tensor


def attend_kept(
    stream: Stream,
    heads: Heads,
    qkv: torch.Tensor,
    seen: Seen,
    start: int,
    out: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """As ``attend``, over a cache of either kind. Raises NativeError if scratch holds no head."""
    if seen.scales is None:
        attend(
            stream, heads, qkv, seen.keys, seen.values, start, out, scale=scale, window=window, sinks=sinks
        )
        return
    first = 0 if window is None else max(0, start - window + 1)
    end, dim = start + len(qkv), heads.head_dim
    group, size = heads.num_heads // heads.num_kv_heads, (end - first) * dim
    most = seen.scratch.nbytes // (2 * size * ITEM_BYTES) if size else heads.num_kv_heads
    if most == 0:
        raise NativeError("scratch holds no head's keys and values", got=seen.scratch.nbytes, limit=size)
    for begin in range(0, heads.num_kv_heads, most):
        count = min(most, heads.num_kv_heads - begin)
        own, floats = slice(begin, begin + count), seen.scratch.view(qkv.dtype)
        keys, values = (
            floats[index * count * size : (index + 1) * count * size].view(count, end - first, dim)
            for index in range(2)
        )
        for codes, scales, to in zip((seen.keys, seen.values), seen.scales, (keys, values), strict=True):
            _dequantise(stream, codes[own, first:end], scales[own, first:end], to)
        queries = slice(begin * group * dim, (begin + count) * group * dim)
        attend(
            stream, Heads(count * group, count, dim), qkv[:, queries], keys, values, start - first,
            out[:, queries], scale=scale, window=window,
            sinks=None if sinks is None else sinks[begin * group : (begin + count) * group],
        )  # fmt: skip


def _dequantise(stream: Stream, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    def action(_: int) -> None:
        torch.mul(codes, scales, out=out)

    stream.launch("floats of codes", action, reads=(codes, scales), writes=(out,))
