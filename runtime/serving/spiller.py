"""Writes prefixes that leave RAM to disk, beside the core's work: gigabytes take seconds."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from krasis.formats.errors import ResourceError
from krasis.runtime.serving.prefix_folder import FileOfPrefix, PrefixFolder, export_of
from krasis.runtime.serving.prefix_store import Layers, Prefix


class SpilledFile:
    """See ``prefix_store.OnDisk``. A file that may yet be in the making."""

    def __init__(self, num_bytes: int, written: Future[FileOfPrefix | None]) -> None:
        self.num_bytes = num_bytes
        self._written = written

    def wait(self) -> None:
        """Returns when it is written, or has failed."""
        self._written.exception()

    def read(self) -> Layers:
        """See ``prefix_store.OnDisk``."""
        file = self._written.result()
        if file is None:
            raise ResourceError("the prefix could not be written to disk")
        return file.read()


class Spiller:
    """One prefix at a time: so RAM holds one more than the store's budget, and no more. For one thread."""

    def __init__(self, folder: PrefixFolder) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, "krasis-spill")
        self._last: SpilledFile | None = None

    def spill(self, prefix: Prefix) -> SpilledFile | None:
        """Begins to write a prefix that is in RAM; None for one that cannot be written."""
        if prefix.layers is None:
            return None
        if self._last is not None:
            self._last.wait()
        written = self._pool.submit(self._folder.save, prefix.tokens, export_of(prefix.layers))
        self._last = SpilledFile(prefix.num_bytes, written)
        return self._last

    def close(self) -> None:
        """Waits for what is being written."""
        self._pool.shutdown()
