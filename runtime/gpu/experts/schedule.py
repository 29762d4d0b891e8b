"""Which experts are copied to the GPU when, and which launches use them. Pure: no device, no tensors.

A layer's experts (of one rank) are cut into groups. A group is a range of experts that one pair of grouped
products covers; the experts in it that must be copied lie in contiguous runs, one DMA each, packed one after
the other into one of two staging buffers. Resident experts cost no copy and no place in a buffer, and an
expert nobody asked for is only covered. The ranges of a layer's groups partition its experts, so each expert
is computed by exactly one group.

Buffers alternate with the sequence number of the copies: copy s goes to buffer s % 2, which copy s - 2 used.
A group without copies has no number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError

Mask = npt.NDArray[np.bool_]
NUM_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Run:
    """Contiguous experts [first, first + count) of a layer, copied to a buffer's places [place, place +
    count).
    """

    first: int
    count: int
    place: int


@dataclass(frozen=True, slots=True)
class Group:
    """Experts [begin, end) of a layer, computed together; those in runs are copied first.

    sequence: number of its copy in the pass, -1 where nothing is copied.
    """

    layer: int
    begin: int
    end: int
    runs: tuple[Run, ...]
    sequence: int

    @property
    def buffer(self) -> int:
        """The staging buffer its experts are copied to."""
        return self.sequence % NUM_BUFFERS

    @property
    def num_copied(self) -> int:
        """Experts that are copied."""
        return sum(run.count for run in self.runs)


def layer_groups(
    layer: int, first: int, num_experts: int, copied: Mask, group_experts: int, sequence: int
) -> tuple[Group, ...]:
    """Groups of the experts [first, first + num_experts) of one layer.

    copied [experts of the layer]: which must be copied. Each group copies at most group_experts of them, as
    evenly shared as can be (9 in groups of 4 are 3, 3, 3: the largest copy decides when the first product can
    begin). sequence: the number of the first copy. Raises NativeError for sizes that make no sense.
    """
    last = first + num_experts
    if num_experts < 1 or not 0 <= first <= last <= len(copied):
        raise NativeError(
            "no such experts", where="layer_groups", got=(first, num_experts), limit=len(copied)
        )
    wanted = np.flatnonzero(copied[first:last]) + first
    if not wanted.size:
        return (Group(layer, first, last, (), -1),)
    if group_experts < 1:
        raise NativeError("no staging buffer, but experts to copy", where=f"layer {layer}", got=wanted.size)
    num_groups = -(-wanted.size // group_experts)
    parts = np.array_split(wanted, num_groups)
    begins = [first, *(int(part[0]) for part in parts[1:])]
    ends = [*begins[1:], last]
    return tuple(
        Group(layer, begin, end, runs_of(part), sequence + index)
        for index, (begin, end, part) in enumerate(zip(begins, ends, parts, strict=True))
    )


def runs_of(experts: npt.NDArray[np.int64]) -> tuple[Run, ...]:
    """Contiguous runs of rising expert numbers, packed into places 0, 1, ..."""
    breaks = np.flatnonzero(np.diff(experts) != 1) + 1
    starts = [0, *breaks.tolist(), len(experts)]
    return tuple(
        Run(int(experts[begin]), end - begin, begin)
        for begin, end in itertools.pairwise(starts)
        if begin < end
    )


def pass_groups(
    first: int, num_experts: int, copied: npt.NDArray[np.bool_], group_experts: int
) -> tuple[tuple[Group, ...], ...]:
    """The groups of every layer of a pass, numbered across layers. copied [layers, experts]."""
    layers: list[tuple[Group, ...]] = []
    sequence = 0
    for layer, mask in enumerate(copied):
        groups = layer_groups(layer, first, num_experts, mask, group_experts, sequence)
        sequence += num_copies(groups)
        layers.append(groups)
    return tuple(layers)


def num_copies(groups: Sequence[Group]) -> int:
    """Groups that copy something."""
    return sum(group.sequence >= 0 for group in groups)


def copies(layers: Sequence[Sequence[Group]]) -> Iterator[Group]:
    """Groups that copy something, in the order of their numbers."""
    for groups in layers:
        yield from (group for group in groups if group.sequence >= 0)


def addresses(
    groups: Sequence[Group], buffers: Sequence[int], record_bytes: int, resident: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Where each expert of a layer lies while its group runs, i64 [experts]; 0: nowhere.

    buffers: device addresses of the two staging buffers. resident [experts]: addresses of resident experts,
    else 0. Experts outside the groups' ranges are 0 even if resident: they are not this rank's, or not
    routed.
    """
    table = np.zeros_like(resident)
    for group in groups:
        table[group.begin : group.end] = resident[group.begin : group.end]
        for run in group.runs:
            places = np.arange(run.place, run.place + run.count, dtype=np.int64)
            table[run.first : run.first + run.count] = buffers[group.buffer] + places * record_bytes
    return table
