"""The way a blob's bytes take into its shard: in order, hashed, cut at the file's 2 MiB boundaries."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from krasis.formats.bundle.shard_output import PIECE_BYTES, ShardOutput
from krasis.formats.bundle.shard_plan import PlacedBlob
from krasis.formats.errors import FormatError
from krasis.formats.files.aligned import aligned_empty, is_page_aligned
from krasis.formats.files.file_ops import io_errors
from krasis.formats.names import shown

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.generic]


class BlobSink:
    """Takes a blob's bytes in order and hashes them. ``close`` must follow, or leaving ``with`` gives the
    blob up.

    Writes end at multiples of 2 MiB of the file where they can: whole pieces can then be written directly,
    and the page cache keeps in huge pages what goes through it.
    """

    __slots__ = ("_blob", "_hash", "_held", "_is_closed", "_output", "_position", "_released", "_tail")

    def __init__(
        self, output: Callable[[], ShardOutput], blob: PlacedBlob, released: Callable[[], None]
    ) -> None:
        """output: the shard, or an error once it is closed. released: called when the sink is done with."""
        self._output, self._blob, self._released = output, blob, released
        self._hash = xxhash.xxh3_128()
        # The first _held bytes are not yet written: less than 2 MiB, ending at _position of the file.
        self._tail = memoryview(aligned_empty(min(PIECE_BYTES, blob.spec.num_bytes)))  # type: ignore[arg-type]
        self._held = 0
        self._position = blob.offset_bytes
        self._is_closed = False

    def write(self, data: Buffer) -> None:
        """Appends bytes (any C-contiguous buffer). FormatError beyond the blob's size, ResourceError on I/O
        errors.
        """
        name = self._blob.spec.name
        if self._is_closed:
            raise FormatError("blob is closed", where=shown(name))
        view = memoryview(data)  # type: ignore[arg-type]  # NumPy's stubs hide that arrays are buffers
        # An empty array cannot be cast to bytes.
        view = view.cast("B") if view.nbytes else memoryview(b"")
        output = self._output()
        end = self._blob.offset_bytes + self._blob.spec.num_bytes
        if self._position + len(view) > end:
            raise FormatError(
                "more data than the blob has room for",
                where=f"{output.path.name}: {shown(name)}",
                got=self._position + len(view) - self._blob.offset_bytes,
                limit=self._blob.spec.num_bytes,
            )
        self._hash.update(view)
        with io_errors("writing", output.path):
            self._append(output, view)

    def _append(self, output: ShardOutput, view: memoryview) -> None:
        start = self._position - self._held
        self._position += len(view)
        boundary = self._position // PIECE_BYTES * PIECE_BYTES
        if boundary <= start:
            self._hold(view)
            return
        if self._held:
            # Up to the next boundary from the tail, so that what follows can be written from the caller's
            # buffer.
            first = (start // PIECE_BYTES + 1) * PIECE_BYTES
            view = self._write_piece(output, view, start, first)
            start = first
        if output.is_direct and boundary > start and not is_page_aligned(view[-start % PIECE_BYTES :]):
            while start < boundary:
                first = (start // PIECE_BYTES + 1) * PIECE_BYTES
                view = self._write_piece(output, view, start, first)
                start = first
        bulk = boundary - start
        output.put(view[:bulk], start)
        self._hold(view[bulk:])

    def _hold(self, view: memoryview) -> None:
        end = self._held + len(view)
        self._tail[self._held : end] = view
        self._held = end

    def _write_piece(self, output: ShardOutput, view: memoryview, start: int, end: int) -> memoryview:
        """Writes what is held and as much of the view as reaches ``end`` of the file. Gives the rest."""
        taken = end - start - self._held
        self._hold(view[:taken])
        output.put(self._tail[: self._held], start)
        self._held = 0
        return view[taken:]

    def close(self) -> str:
        """Writes what is left and returns the XXH3-128 digest (hex). FormatError if data is missing.
        Idempotent.
        """
        if not self._is_closed:
            spec, output = self._blob.spec, self._output()
            written = self._position - self._blob.offset_bytes
            if written != spec.num_bytes:
                raise FormatError(
                    "blob is incomplete",
                    where=f"{output.path.name}: {shown(spec.name)}",
                    got=written,
                    limit=spec.num_bytes,
                )
            with io_errors("writing", output.path):
                output.put(self._tail[: self._held], self._position - self._held)
            self._held = 0
            self._release()
        return str(self._hash.hexdigest())

    def _release(self) -> None:
        self._is_closed = True
        self._tail = memoryview(b"")
        self._released()

    def __enter__(self) -> BlobSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_closed:
            self._release()
