"""Rings of layers with a window, on the device: what a pass sees of them, one position after another, and
copies of their ends.

A pass of many tokens overwrites what its first ones see. Its keys and values lie in scratch meanwhile, behind
those of the ring that they see; attention reads both there, and then the last ones go to the ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from krasis.formats.models.state import TAIL_TOKENS
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.cache_parts import F32_BYTES, CachePart
from krasis.runtime.gpu.chunk import Piece
from krasis.runtime.gpu.kernels.attention_rows import CachePlace

if TYPE_CHECKING:
    from krasis.runtime.gpu.kv_cache import GpuKvCache


def copied_rows(part: CachePart) -> int:
    """The most positions of a ring that a copy has: the window before the first position that it takes a slot
    back to, and so on to its own."""
    return (part.window or 0) + TAIL_TOKENS


def copied_bytes(part: CachePart) -> int:
    """Of a layer in a copy."""
    return copied_rows(part) * part.row_bytes


class KvRings:
    """Those of a cache that has such. windows: (window, places), each once."""

    def __init__(self, cache: GpuKvCache, stream: Stream) -> None:
        self._cache, self._stream = cache, stream
        self.parts = cache.ring_parts
        self.windows = frozenset((part.window or 0, part.ring) for part in self.parts.values())
        self._begins, begin = dict[int, int](), 0
        for layer, part in self.parts.items():
            self._begins[layer], begin = begin, begin + copied_bytes(part)

    def rows(self, slot: int, layer: int, begin: int, end: int) -> list[list[torch.Tensor]]:
        """Views of what a ring has of some positions, in pieces."""
        kept = [*self._cache.layer(slot, layer), *(self._cache.scales(slot, layer) or ())]
        return [[rows[:, span] for rows in kept] for span in self.parts[layer].ranges(begin, end)]

    def copied(self, slot: int, number: int, layer: int, begin: int, end: int) -> list[torch.Tensor]:
        """Views of a copy's rows, [begin, end) of those that it has of the layer."""
        part, at = self.parts[layer], self._begins[layer]
        memory = self._cache.copies[slot, number, at : at + copied_bytes(part)]
        views = _unaligned(part, memory, self._cache.dtype)
        return [rows[:, begin:end] for rows in views]

    def save(self, slot: int, number: int, lowest: int, end: int) -> None:
        """A copy becomes what positions from lowest to end see before them."""
        for layer, part in self.parts.items():
            self._move(layer, slot, number, first_copied(part, lowest), end, to_copy=True)

    def restore(self, slot: int, number: int, lowest: int, end: int) -> None:
        """What ``save`` copied comes back."""
        for layer, part in self.parts.items():
            self._move(layer, slot, number, first_copied(part, lowest), end, to_copy=False)

    def _move(self, layer: int, slot: int, number: int, first: int, end: int, *, to_copy: bool) -> None:
        copied = self.copied(slot, number, layer, 0, end - first)
        pieces = self.rows(slot, layer, first, end)
        if to_copy:
            copy_pieces(self._stream, [copied], pieces)
        else:
            copy_pieces(self._stream, pieces, [copied])


@contextmanager
def ring_place(
    stream: Stream, cache: GpuKvCache, layer: int, piece: Piece, scratch: torch.Tensor
) -> Iterator[CachePlace]:
    """Where the keys and values of a piece are put, and read: behind those before it that its first token
    sees, which are there. Behind the block the last of them are in the ring.

    scratch: room for them. The place's start is numbered from the first of those before.
    """
    part, num_rows = cache.part(layer), piece.last - piece.first
    start, end = piece.position, piece.position + num_rows
    first, rings = first_seen(part, start), KvRings(cache, stream)
    rows = part.linear(end - first).views(scratch.view(-1), end - first, cache.dtype)
    if first < start:
        copy_pieces(
            stream, [[one[:, : start - first] for one in rows]], rings.rows(piece.slot, layer, first, start)
        )
    yield CachePlace(rows[0], rows[1], start - first, scales=(rows[2], rows[3]) if len(rows) > 2 else None)
    kept = max(start, end - part.ring)
    copy_pieces(stream, rings.rows(piece.slot, layer, kept, end), [[one[:, kept - first :] for one in rows]])


def first_copied(part: CachePart, lowest: int) -> int:
    """The first position that a copy has which takes a slot back to ``lowest``."""
    return max(0, lowest - (part.window or 0))


def first_seen(part: CachePart, position: int) -> int:
    """The first of the positions before one that a token there sees."""
    return max(0, position - (part.window or 0) + 1)


def copy_pieces(
    stream: Stream, to: Sequence[Sequence[torch.Tensor]], source: Sequence[Sequence[torch.Tensor]]
) -> None:
    """Rows [heads, n, ..] of source to those of to, in order; each has as many in all, in other pieces."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name in range(len(to[0])):
        given = [piece[name] for piece in source]
        begin = 0
        for rows in (piece[name] for piece in to):
            end = begin + rows.shape[1]
            at = 0
            for own in given:
                low, high = max(begin, at), min(end, at + own.shape[1])
                if low < high:
                    pairs.append((rows[:, low - begin : high - begin], own[:, low - at : high - at]))
                at += own.shape[1]
            begin = end
    if not pairs:
        return

    def action(_: int) -> None:
        for rows, own in pairs:
            rows.copy_(own)

    reads, writes = [own for _, own in pairs], [rows for rows, _ in pairs]
    stream.launch("copy of a window", action, reads=reads, writes=writes)


def _unaligned(part: CachePart, memory: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """As ``CachePart.views``, of a copy: keys and values, each behind the one before."""
    num_rows, item_bytes = copied_rows(part), 1 if part.has_scales else 2
    key_bytes = part.head_dim * item_bytes + (F32_BYTES if part.has_scales else 0)
    packed = replace(part, keys=0, values=part.num_kv_heads * num_rows * key_bytes, ring=0)
    return packed.views(memory, num_rows, dtype)
