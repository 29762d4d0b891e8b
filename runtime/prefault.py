"""Reads mapped weights into memory in the background, so that the first tokens do not wait for the disk page
by page."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence

from krasis.formats.bundle_reader import Bundle
from krasis.formats.errors import KrasisError
from krasis.formats.file_mapping import prefault
from krasis.runtime.kv_cache import available_memory_bytes

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 * 2**20
NUM_THREADS = 4  # enough to keep an NVMe drive busy, few enough to leave the kernels their cores


class Prefault:
    """Brings whole files of a bundle into memory, in order, by a few threads. ``stop`` before the bundle is
    closed."""

    def __init__(self, bundle: Bundle, files: Sequence[str], num_threads: int = NUM_THREADS) -> None:
        self._ranges = [bundle.mapping_of(file) for file in files]
        self._pieces = self._split()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._num_bytes = 0
        self._running = num_threads
        self._begin = time.perf_counter()
        self._threads = [
            threading.Thread(target=self._work, name=f"krasis-prefault-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the reading; returns when no thread touches the mappings any more."""
        self._stopping.set()
        self.wait()

    def wait(self) -> None:
        """Returns when everything is in memory."""
        for thread in self._threads:
            thread.join()

    def _split(self) -> Iterator[tuple[int, int]]:
        for address, num_bytes in self._ranges:
            for offset in range(0, num_bytes, PIECE_BYTES):
                yield address + offset, min(PIECE_BYTES, num_bytes - offset)

    def _work(self) -> None:
        try:
            self._read_pieces()
        except KrasisError as error:
            # The kernels read the same pages, and are the ones to fail if the disk does.
            logger.warning("prefault stopped: %s", error)
            self._stopping.set()
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            self._report()

    def _read_pieces(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                piece = next(self._pieces, None)
            if piece is None:
                return
            prefault(*piece)
            with self._lock:
                self._num_bytes += piece[1]

    def _report(self) -> None:
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        stopped = " (stopped early)" if self._stopping.is_set() else ""
        logger.info(
            "prefault: %.2f GB of weights in %.2f s, %.1f GB/s%s",
            self._num_bytes / 1e9,
            seconds,
            self._num_bytes / 1e9 / seconds,
            stopped,
        )


def start_prefault(bundle: Bundle, tiers: Sequence[str]) -> Prefault | None:
    """Reads the tiers' weights in the background; None, with a warning, if they are more than memory can
    hold."""
    num_bytes = sum(blob.num_bytes for blob in bundle.manifest.blobs if blob.tier in tiers)
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
    return Prefault(bundle, files_of_tiers(bundle, tiers))


def files_of_tiers(bundle: Bundle, tiers: Sequence[str]) -> list[str]:
    """The shards that hold blobs of the tiers, in the order of the tiers."""
    found: dict[str, None] = {}
    for tier in tiers:
        for blob in bundle.manifest.blobs:
            if blob.tier == tier:
                found.setdefault(blob.file)
    return list(found)
