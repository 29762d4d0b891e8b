"""The shards that hold a rank's experts, read by layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.host_memory.experts import Experts, open_shard
from krasis.runtime.host_memory.reader import ShardReader

Bytes = npt.NDArray[np.uint8]


class Shards:
    """Readers of all files. Raises FormatError or ResourceError if one cannot be opened. ``close`` it."""

    def __init__(self, bundle: Bundle, experts: Experts, *, direct: bool = True) -> None:
        self._experts = experts
        self._readers: dict[str, ShardReader] = {}
        try:
            for layer in experts.layers:
                if layer.file not in self._readers:
                    fd = open_shard(bundle, layer.file)
                    self._readers[layer.file] = ShardReader(fd, str(bundle.path / layer.file), direct=direct)
        except BaseException:
            self.close()
            raise

    def reader(self, layer: int) -> ShardReader:
        """The reader of the file that holds this layer's experts."""
        return self._readers[self._experts.layers[layer].file]

    @property
    def filesystems(self) -> tuple[str, ...]:
        """The file systems of the files, each once, sorted."""
        return tuple(sorted({reader.filesystem for reader in self._readers.values()}))

    @property
    def why_buffered(self) -> str:
        """The reason why some file is not read directly; empty if all are."""
        return next((reader.why_buffered for reader in self._readers.values() if reader.why_buffered), "")

    @property
    def direct_bytes(self) -> int:
        """Read past the page cache so far."""
        return sum(reader.direct_bytes for reader in self._readers.values())

    @property
    def cached_bytes(self) -> int:
        """Read through it so far."""
        return sum(reader.cached_bytes for reader in self._readers.values())

    def read(self, layer: int, begin: int, out: Bytes, *, keep: bool = False) -> None:
        """Fills out, uint8 [n], with the rank's bytes from ``begin`` of a layer. Errors: see
        ``ShardReader.read``.
        """
        place = self._experts.layers[layer]
        address = int(place.mapped.ctypes.data) + begin
        self.reader(layer).read(place.offset_bytes + begin, out, address, keep=keep)

    def close(self) -> None:
        """Closes the files. Calling it again does nothing."""
        for reader in self._readers.values():
            reader.close()
