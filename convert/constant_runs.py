"""Finds long stretches of a tensor that hold one and the same weight: no training leaves those, but a
download that broke off, a file that was never written to its end, or a hole in a copy does.

A few hundred places of a tensor are looked at, so that it costs next to nothing beside packing; what looks
like a stretch is then read in full, so that nothing is reported that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.convert.slices import Bytes, TensorSlice

LONG_BYTES = 64 << 10
SHORTEST_SHARE = 8  # of a small tensor, an eighth is long
_SHORTEST_WEIGHTS = 32
_LOOKS = 8  # places looked at within the shortest stretch
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ConstantRun:
    """Weights ``start`` to ``stop`` of a slice, in the file's order, are the same (of quantised types: the
    same blocks over and over). is_zero: and are zero.
    """

    start: int
    stop: int
    is_zero: bool

    @property
    def num_weights(self) -> int:
        """How many."""
        return self.stop - self.start


def constant_runs(piece: TensorSlice) -> list[ConstantRun]:
    """The long stretches of a slice, in order."""
    block_weights, block_bytes = piece.block
    num_blocks = piece.raw.nbytes // block_bytes
    shortest = max(
        -(-_SHORTEST_WEIGHTS // block_weights),
        min(num_blocks // SHORTEST_SHARE, LONG_BYTES // block_bytes),
    )
    stride = max(1, shortest // _LOOKS)
    found = []
    for first, last in _equal_stretches(
        _keys(piece.raw, block_bytes, stride), max(1, shortest // stride - 2)
    ):
        start, stop = _grown(piece.raw.reshape(-1, block_bytes), first * stride, last * stride + 1, stride)
        if stop - start >= shortest:
            found.append(ConstantRun(start * block_weights, stop * block_weights, piece.is_zero(start)))
    return found


def _keys(raw: Bytes, block_bytes: int, stride: int) -> npt.NDArray[Any]:
    """The first bytes of every stride-th block, as numbers."""
    if block_bytes in (2, 4, 8):
        return raw.view(f"<u{block_bytes}")[::stride]
    looked = raw.reshape(-1, block_bytes)[::stride, :8]
    keys = np.zeros((len(looked), 8), np.uint8)
    keys[:, : looked.shape[1]] = looked
    return keys.view("<u8").reshape(-1)


def _equal_stretches(keys: npt.NDArray[Any], shortest: int) -> Iterator[tuple[int, int]]:
    """(first, last) indices of stretches in which at least ``shortest`` keys equal the one before."""
    equal = keys[1:] == keys[:-1]
    if np.count_nonzero(equal) < shortest:
        return
    edges = np.flatnonzero(np.diff(np.concatenate(([False], equal, [False])).view(np.int8)))
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if last - first >= shortest:
            yield first, last


def _grown(blocks: Bytes, start: int, stop: int, stride: int) -> tuple[int, int]:
    """The stretch of blocks equal to that at start, both ways; empty if start to stop are not all equal."""
    value = blocks[start].copy()

    def num_equal(begin: int, end: int) -> int:
        """Equal blocks from begin on."""
        same = (blocks[begin:end] == value).all(axis=1)
        return int(same.argmin()) if not same.all() else len(same)

    step = max(1, _READ_BYTES // blocks.shape[1])
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        if num_equal(begin, end) < end - begin:
            return start, start
    before = (blocks[max(0, start - stride) : start][::-1] == value).all(axis=1)
    start -= int(before.argmin()) if not before.all() else len(before)
    return start, stop + num_equal(stop, min(stop + stride, len(blocks)))
