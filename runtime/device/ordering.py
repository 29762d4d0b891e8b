"""Who touched which bytes, and whether each access is ordered after those it must follow.

Happens-before by vector clocks. A clock says, for the host (component 0) and every stream, how many of its
accesses are known to be over. An access that wrote must be over before its bytes are read or written again,
one that read before they are written. Histories keep, for every byte, the last write and the last read of
each component since.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
import torch

from krasis.formats.errors import KrasisError

HOST = 0
Clock = dict[int, int]
Ranges = list[tuple[int, int]]  # bytes [begin, end), ascending, apart


class OrderingError(KrasisError):
    """Work touches memory without being ordered after what was done to it: on a GPU, a race."""

    exit_code = 9


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """One launch, copy or host access: the count-th of its component, and its name for messages."""

    component: int
    count: int
    label: str

    def is_before(self, clock: Clock) -> bool:
        """Whether whoever has this clock knows that the access is over."""
        return self.count <= clock.get(self.component, 0)


def join(clock: Clock, other: Clock) -> None:
    """clock learns what other knows."""
    for component, count in other.items():
        if count > clock.get(component, 0):
            clock[component] = count


def byte_ranges(tensor: torch.Tensor) -> Ranges:
    """The bytes a strided view covers, as addresses; adjacent ranges are merged."""
    if tensor.numel() == 0:
        return []
    run = item = tensor.element_size()
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    dimensions = sorted((abs(stride) * item, size) for size, stride in sizes if size > 1 and stride != 0)
    starts = np.zeros(1, np.int64)
    for stride, size in dimensions:
        if stride == run and len(starts) == 1:
            run *= size
        else:
            starts = (np.arange(size, dtype=np.int64)[:, None] * stride + starts).reshape(-1)
    base = tensor.data_ptr()
    if len(starts) == 1:
        return [(base, base + run)]
    merged: Ranges = []
    for start in np.sort(starts + base).tolist():
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], start + run))
        else:
            merged.append((start, start + run))
    return merged


@dataclass(frozen=True, slots=True)
class Conflict:
    """Bytes [begin, end) of a history, and the access not known to be over; None: they were never written."""

    begin: int
    end: int
    other: Access | None
    other_wrote: bool


@dataclass(frozen=True, slots=True)
class _State:
    write: Access | None
    reads: tuple[Access, ...]

    def after_read(self, access: Access) -> _State:
        others = tuple(read for read in self.reads if read.component != access.component)
        return _State(self.write, (*others, access))


class History:
    """The accesses of one allocation of num_bytes. Offsets are relative to its beginning."""

    __slots__ = ("_starts", "_states", "num_bytes")

    def __init__(self, num_bytes: int, write: Access | None = None) -> None:
        self.num_bytes = num_bytes
        # Parallel: stretch i reaches from _starts[i] to _starts[i + 1] (the last to num_bytes).
        self._starts = [0]
        self._states = [_State(write, ())]

    @property
    def num_stretches(self) -> int:
        """Stretches of bytes with one history: what an access costs."""
        return len(self._starts)

    def read(self, begin: int, end: int, access: Access, clock: Clock) -> Conflict | None:
        """Notes a read, unless it conflicts with a write."""
        first, last = self._stretches(begin, end)
        for index in range(first, last):
            write = self._states[index].write
            if write is None or not write.is_before(clock):
                return Conflict(*self._overlap(index, begin, end), write, True)
        first, last = self._cut(begin), self._cut(end)
        starts: list[int] = []
        states: list[_State] = []
        for index in range(first, last):
            state = self._states[index].after_read(access)
            if not states or state != states[-1]:
                starts.append(self._starts[index])
                states.append(state)
        self._starts[first:last], self._states[first:last] = starts, states
        return None

    def write(self, begin: int, end: int, access: Access, clock: Clock) -> Conflict | None:
        """Notes a write, unless it conflicts with a read or a write."""
        first, last = self._stretches(begin, end)
        for index in range(first, last):
            state = self._states[index]
            if state.write is not None and not state.write.is_before(clock):
                return Conflict(*self._overlap(index, begin, end), state.write, True)
            for read in state.reads:
                if not read.is_before(clock):
                    return Conflict(*self._overlap(index, begin, end), read, False)
        first, last = self._cut(begin), self._cut(end)
        self._starts[first:last], self._states[first:last] = [begin], [_State(access, ())]
        return None

    def _stretches(self, begin: int, end: int) -> tuple[int, int]:
        return bisect_right(self._starts, begin) - 1, bisect_left(self._starts, end)

    def _overlap(self, index: int, begin: int, end: int) -> tuple[int, int]:
        following = self._starts[index + 1] if index + 1 < len(self._starts) else self.num_bytes
        return max(begin, self._starts[index]), min(end, following)

    def _cut(self, at: int) -> int:
        """The index of the stretch that begins at an offset; makes one begin there."""
        if at == self.num_bytes:
            return len(self._starts)
        index = bisect_left(self._starts, at)
        if index == len(self._starts) or self._starts[index] != at:
            self._starts.insert(index, at)
            self._states.insert(index, self._states[index - 1])
        return index
