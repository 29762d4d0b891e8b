"""Reads mapped weights into memory in the background, so that the first tokens do not wait for the disk page
by page.

On a machine with several NUMA nodes a page comes to lie on the node whose thread reads it first. There every
piece is read by a thread bound to the node whose threads compute with it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import KrasisError
from krasis.formats.files.file_mapping import prefault
from krasis.formats.limits import HUGE_PAGE_BYTES, MIB
from krasis.formats.process.machine_limits import available_memory_bytes
from krasis.formats.process.stages import tell
from krasis.runtime.host.filesystem import weights_to_hold_bytes
from krasis.runtime.host.huge_pages import collapse_all, huge_share
from krasis.runtime.host.numa import (
    NumaNode,
    nodes_of_pages,
    numa_nodes,
    owned_ranges,
    piece_owners,
    read_exactly,
)
from krasis.runtime.loading import is_loading

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 * 2**20
NUM_THREADS = 4  # of a node: enough to keep an NVMe drive busy, few enough to leave the kernels their cores
EARLY_POLL_S = 0.02
NUM_SAMPLES = 512  # pages asked where they lie
ENOUGH_HUGE = 0.9  # share in huge pages; a shard's header and the ends of its blobs may be none
MATTERING_BYTES = 256 * MIB  # of fewer weights the caches hold a good part, whatever pages they lie in

MappedRange = tuple[int, int]  # address, bytes


class Prefault:
    """Brings whole files of a bundle into memory, in order, by a few threads. ``stop`` before the bundle is
    closed."""

    def __init__(
        self,
        bundle: Bundle,
        files: Sequence[str],
        num_threads: int = NUM_THREADS,
        nodes: Sequence[NumaNode] = (),
        is_early: Callable[[], bool] = lambda: False,
    ) -> None:
        """nodes: several: each reads its own pieces with num_threads threads bound to it; else nothing is
        bound. is_early: while it says so, nothing is read yet: what is needed first comes from the same disk.

        ``huge_share``: of what was read, the share that lies in huge pages; None until all is read, and for
        weights so few that it does not matter.
        """
        self.huge_share: float | None = None
        self._bundle, self._files, self._is_early = bundle, files, is_early
        self._ranges = [bundle.mapping_of(file) for file in files]
        self._nodes = tuple(nodes) if len(nodes) > 1 else ()
        self._pieces = [self._pieces_of(node) for node in range(len(self._nodes))] or [self._split()]
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._num_bytes = 0
        self._samples: list[tuple[int, int]] = []  # address, node
        self._running = num_threads * len(self._pieces)
        self._begin: float | None = None  # of reading
        if self._nodes:
            self._read_exactly(True)
        self._threads = [
            threading.Thread(target=self._work, args=(index % len(self._pieces),), daemon=True)
            for index in range(self._running)
        ]
        for index, thread in enumerate(self._threads):
            thread.name = f"krasis-prefault-{index}"
            thread.start()

    def stop(self) -> None:
        """Ends the reading; returns when no thread touches the mappings any more."""
        self._stopping.set()
        self.wait()

    def wait(self) -> None:
        """Returns when everything is in memory."""
        for thread in self._threads:
            thread.join()

    def progress(self) -> tuple[int, int] | None:
        """(bytes read, bytes in all) while it reads; None before and behind that."""
        with self._lock:
            if self._begin is None or not self._running:
                return None
            return self._num_bytes, sum(num_bytes for _, num_bytes in self._ranges)

    def _split(self) -> Iterator[MappedRange]:
        for address, num_bytes in self._ranges:
            for offset in range(0, num_bytes, PIECE_BYTES):
                yield address + offset, min(PIECE_BYTES, num_bytes - offset)

    def _pieces_of(self, node: int) -> Iterator[MappedRange]:
        blobs, spec = self._bundle.manifest.blobs, self._bundle.spec
        for file, (address, num_bytes) in zip(self._files, self._ranges, strict=True):
            ranges = (
                item
                for blob in blobs
                if blob.file == file
                for item in owned_ranges(blob, spec, len(self._nodes))
            )
            owners = piece_owners(ranges, num_bytes, HUGE_PAGE_BYTES, len(self._nodes))
            for index, owner in enumerate(owners):
                if owner == node:
                    offset = index * HUGE_PAGE_BYTES
                    yield address + offset, min(HUGE_PAGE_BYTES, num_bytes - offset)

    def _work(self, queue: int) -> None:
        while self._is_early() and not self._stopping.wait(EARLY_POLL_S):
            pass
        with self._lock:
            self._begin = self._begin or time.monotonic()
        try:
            if self._nodes:
                _bind(self._nodes[queue])
            self._read_pieces(queue)
        except KrasisError as error:
            # The kernels read the same pages, and are the ones to fail if the disk does.
            logger.warning("prefault stopped: %s", error)
            self._stopping.set()
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            self._report()
            if self._nodes:
                self._read_exactly(False)
                self._report_nodes()
            self._make_huge()

    def _read_pieces(self, queue: int) -> None:
        num_pages = sum(num_bytes for _, num_bytes in self._ranges) // HUGE_PAGE_BYTES
        step = num_pages // NUM_SAMPLES + 1
        while not self._stopping.is_set():
            with self._lock:
                piece = next(self._pieces[queue], None)
            if piece is None:
                return
            prefault(*piece)
            with self._lock:
                self._num_bytes += piece[1]
                if self._nodes and piece[0] // HUGE_PAGE_BYTES % step == 0:
                    self._samples.append((piece[0], queue))

    def _read_exactly(self, exactly: bool) -> None:
        try:
            for address, num_bytes in self._ranges:
                read_exactly(address, num_bytes, exactly=exactly)
        except KrasisError as error:
            logger.warning("the order of reading stays as it is: %s", error)

    def _report(self) -> None:
        begin = self._begin or time.monotonic()
        seconds = max(time.monotonic() - begin, 1e-9)
        tell("(behind) weights read ahead", begin)
        stopped = " (stopped early)" if self._stopping.is_set() else ""
        logger.info(
            "prefault: %.2f GB of weights in %.2f s, %.1f GB/s%s",
            self._num_bytes / 1e9,
            seconds,
            self._num_bytes / 1e9 / seconds,
            stopped,
        )

    def _make_huge(self) -> None:
        if self._num_bytes < MATTERING_BYTES:
            return
        share = huge_share(self._ranges)
        if share is not None and share < ENOUGH_HUGE and not self._stopping.is_set():
            collapse_all(self._ranges, NUM_THREADS, self._stopping)
            share = huge_share(self._ranges)
        if share is not None and not self._stopping.is_set():
            self.huge_share = share
            logger.info("prefault: %.0f %% of the weights lie in huge pages", 100 * share)

    def _report_nodes(self) -> None:
        try:
            numbers = nodes_of_pages([address for address, _ in self._samples])
        except KrasisError as error:
            logger.info("prefault: where the pages lie is not known: %s", error)
            return
        pairs = [
            number == self._nodes[node].number
            for number, (_, node) in zip(numbers, self._samples, strict=True)
            if number >= 0
        ]
        logger.info(
            "prefault: %d NUMA nodes; %d of %d pages looked at lie on the node that computes with them "
            "(what was in memory before stays where it was)",
            len(self._nodes),
            sum(pairs),
            len(pairs),
        )


def _bind(node: NumaNode) -> None:
    """Lets this thread run on the node's CPUs only."""
    try:
        os.sched_setaffinity(0, node.cpus)  # 0: this thread alone
    except OSError as error:
        logger.warning("prefault: a thread cannot be bound to NUMA node %d: %s", node.number, error)


def start_prefault(bundle: Bundle, tiers: Sequence[str], backend: object = None) -> Prefault | None:
    """Reads the tiers' weights in the background; None, with a warning, if they are more than memory can
    hold. backend: what it loads itself comes first: a prompt waits for it, and reads these weights later."""
    num_bytes = weights_to_hold_bytes(bundle, tuple(tiers))
    available = available_memory_bytes()
    if available is not None and num_bytes > available:
        logger.warning(
            "%s: %.1f GB of weights do not fit in the %.1f GB of memory available: "
            "they will be read from disk again and again, which is slow",
            bundle.path,
            num_bytes / 1e9,
            available / 1e9,
        )
        return None
    files = files_of_tiers(bundle, tiers)
    return Prefault(bundle, files, nodes=numa_nodes(), is_early=partial(is_loading, backend))


def files_of_tiers(bundle: Bundle, tiers: Sequence[str]) -> list[str]:
    """The shards that hold blobs of the tiers, in the order of the tiers."""
    found: dict[str, None] = {}
    for tier in tiers:
        for blob in bundle.manifest.blobs:
            if blob.tier == tier:
                found.setdefault(blob.file)
    return list(found)
