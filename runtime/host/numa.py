"""The NUMA nodes this process may run on, and which of them owns which bytes of the weights.

The kernels split the rows of a weight among the nodes (``csrc/cpu/topology.h``). A page of the page cache
stays on the node whose thread read it first, so whoever brings weights into memory has to split them alike:
``owned_ranges`` says how, by the rule the native library exports.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from krasis.formats.bundle.manifest_records import BlobRecord
from krasis.formats.layouts import layout_from_id
from krasis.formats.layouts.expert_format import Strips
from krasis.formats.models.spec import ModelSpec
from krasis.formats.native import check
from krasis.runtime.cpu.native import NumaCpu, prototype


@dataclass(frozen=True, slots=True)
class NumaNode:
    """A node with CPUs of the affinity mask. number: the kernel's."""

    number: int
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OwnedRange:
    """Bytes of a file; node is an index into the list of nodes."""

    offset_bytes: int
    num_bytes: int
    node: int


def numa_nodes() -> tuple[NumaNode, ...]:
    """At least one node. Raises NativeError for a library that is too old."""
    function = prototype("krasis_numa_cpus")
    count = ctypes.c_int64()
    check(function(0, None, ctypes.byref(count)), "krasis_numa_cpus")
    found = (NumaCpu * count.value)()
    check(function(len(found), found, ctypes.byref(count)), "krasis_numa_cpus")
    nodes: dict[int, list[int]] = {}
    for entry in found[: count.value]:
        nodes.setdefault(entry.id, []).append(entry.cpu)
    return tuple(NumaNode(number, tuple(cpus)) for number, cpus in nodes.items())


def first_unit(units: int, num_nodes: int, node: int) -> int:
    """Node i owns the units of a run from ``first_unit(units, n, i)`` to ``first_unit(units, n, i + 1)``."""
    return prototype("krasis_numa_first_unit")(units, num_nodes, node)


def owned_ranges(blob: BlobRecord, spec: ModelSpec, num_nodes: int) -> Iterator[OwnedRange]:
    """The ranges of a blob, by offset in its file, that one node's threads read; none if all threads do."""
    layout = layout_from_id(blob.layout)
    if layout is None:
        return
    experts = next((layer.experts for layer in spec.layers if layer.experts is not None), None)
    sizes = (spec.hidden, 0, True)
    if experts is not None:
        sizes = (experts.width(spec.hidden), experts.intermediate, experts.gated)
    for strips in layout.strips(blob.shape, blob.num_bytes, *sizes):
        yield from _split(blob.offset_bytes, strips, num_nodes)


def _split(begin: int, strips: Strips, num_nodes: int) -> Iterator[OwnedRange]:
    strip_bytes = strips.num_bytes // strips.count
    begin += strips.offset_bytes
    for share in range(num_nodes):
        first, end = (first_unit(strips.count, num_nodes, share + i) for i in (0, 1))
        if first < end:
            node = num_nodes - 1 - share if strips.mirrored else share
            yield OwnedRange(begin + first * strip_bytes, (end - first) * strip_bytes, node)


def piece_owners(ranges: Iterable[OwnedRange], num_bytes: int, piece_bytes: int, num_nodes: int) -> list[int]:
    """The node of each piece of a file: who owns most of its bytes; in turn where nobody owns any.

    A piece is the least that can be placed: one huge page cannot lie on two nodes.
    """
    count = -(-num_bytes // piece_bytes)
    owned = np.zeros((count, num_nodes), np.int64)
    for item in ranges:
        at, end = item.offset_bytes, item.offset_bytes + item.num_bytes
        while at < end:
            stop = min(end, (at // piece_bytes + 1) * piece_bytes)
            owned[at // piece_bytes, item.node] += stop - at
            at = stop
    most = owned.argmax(axis=1)
    in_turn = np.arange(count) % num_nodes
    return [int(node) for node in np.where(owned.any(axis=1), most, in_turn)]


def nodes_of_pages(addresses: Sequence[int]) -> list[int]:
    """The kernel's number of the node each address's page lies on; negative for one that is not in memory.

    Raises ResourceError where the system does not tell, as in some containers.
    """
    pages = np.array(addresses, np.uint64)
    numbers = np.zeros(len(pages), np.int32)
    status = prototype("krasis_numa_page_nodes")(pages.ctypes.data, len(pages), numbers.ctypes.data)
    check(status, "krasis_numa_page_nodes")
    return [int(number) for number in numbers]


def read_exactly(address: int, num_bytes: int, *, exactly: bool) -> None:
    """Whether reading a huge page of a mapping brings in the next one too; ResourceError if refused."""
    check(prototype("krasis_numa_read_exactly")(address, num_bytes, int(exactly)), "krasis_numa_read_exactly")
