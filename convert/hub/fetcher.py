"""Brings parts of sources to the disk: those that somebody waits for first, others ahead of their need."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from krasis.convert.hub.spans import Span, Spans
from krasis.convert.hub.store import SourceStore, StoredFile
from krasis.formats.errors import KrasisError, ResourceError
from krasis.formats.files.file_ops import io_errors

NUM_CONNECTIONS = 4
# A request costs a redirect and a signature; a kill costs what was not complete.
PART_BYTES = 32 << 20


class Reader(Protocol):
    """Where a file's bytes come from."""

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes from begin to end, in order."""


@dataclass(frozen=True, slots=True)
class _Part:
    file: StoredFile
    begin: int
    end: int

    def span(self) -> Span:
        return self.begin, self.end


class Fetcher:
    """Threads that fill the files of a store. readers: by path.

    ``need`` is what a checkpoint calls before its bytes are read. allowed_bytes: what may lie on the disk
    while parts are brought that nobody waits for.
    """

    def __init__(
        self, store: SourceStore, readers: Mapping[Path, Reader], num_threads: int = NUM_CONNECTIONS
    ) -> None:
        self._store, self._readers = store, readers
        self.allowed_bytes = 0
        self.fetched_bytes = 0
        self._urgent: deque[_Part] = deque()
        self._ahead: deque[_Part] = deque()
        self._busy: list[_Part] = []
        self._error: KrasisError | None = None
        self._sizes_only = self._ends = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    # ---- for readers ------------------------------------------------------------------------------------

    def need(self, path: Path, begin: int, end: int) -> None:
        """Returns when these bytes of a file are there. Raises KrasisError if they cannot be had."""
        file = self._store.files.get(Path(os.path.abspath(path)))  # noqa: PTH100 -- links are not followed
        if file is None:  # a source of the user's own
            return
        with self._changed:
            while not self._sizes_only:
                missing = Spans([(begin, end)]).without(file.present)
                if not missing:
                    return
                if self._error is not None:
                    raise self._error
                self._hurry(file, missing)
                self._changed.wait()

    @contextmanager
    def sizes_only(self) -> Iterator[None]:
        """Inside, only sizes and types of tensors are looked at, and nothing is fetched."""
        self._sizes_only = True
        try:
            yield
        finally:
            self._sizes_only = False

    def _hurry(self, file: StoredFile, missing: Spans) -> None:
        """Whole parts that were to come anyway are taken first: small requests are slow."""
        for part in [one for one in self._ahead if one.file is file and missing.within(*one.span())]:
            self._ahead.remove(part)
            self._urgent.append(part)
        coming = [one.span() for one in (*self._urgent, *self._busy) if one.file is file]
        self._urgent.extend(_parts(file, missing.without(coming)))
        self._changed.notify_all()

    # ---- for the conversion -----------------------------------------------------------------------------

    def expect(self, wanted: Iterable[tuple[Path, Spans]]) -> None:
        """What will be needed next, in order; replaces what was expected before."""
        with self._changed:
            self._ahead.clear()
            for path, spans in wanted:
                file = self._store.files[path]
                self._ahead.extend(_parts(file, spans.without(file.present)))
            self._changed.notify_all()

    def drop_but(self, kept: Mapping[Path, Spans]) -> None:
        """Frees everything but these parts."""
        with self._changed:
            for path, file in self._store.files.items():
                for begin, end in file.present.without(kept.get(path, Spans())):
                    self._store.drop(file, begin, end)
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nothing is needed any more: whoever waits, in any thread, gets an error."""
        with self._changed:
            self._error = self._error or ResourceError("the conversion has ended")
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads; what they were at is given up."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # ---- threads ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (part := self._next()) is not None:
            error: KrasisError | None = ResourceError("a download ended without a reason")
            try:
                self._load(part)
                error = None
            except KrasisError as refused:
                error = refused
            finally:  # whoever waits is told in any case
                with self._changed:
                    self._busy.remove(part)
                    self._error = self._error or error
                    self._changed.notify_all()

    def _next(self) -> _Part | None:
        with self._changed:
            while True:
                if self._ends or self._error is not None:
                    return None
                if (part := self._take()) is not None:
                    self._busy.append(part)
                    return part
                self._changed.wait()

    def _take(self) -> _Part | None:
        """The next part that may be fetched, cut to what is missing of it."""
        for queue in (self._urgent, self._ahead):
            while queue:
                part = queue[0]
                busy = [one.span() for one in self._busy if one.file is part.file]
                missing = Spans([part.span()]).without(part.file.present).without(busy)
                if not missing:
                    queue.popleft()
                    continue
                begin, end = next(iter(missing))
                if queue is self._ahead and self._held_bytes() + end - begin > self.allowed_bytes:
                    break
                if (begin, end) == part.span():
                    queue.popleft()
                return _Part(part.file, begin, end)
        return None

    def _held_bytes(self) -> int:
        present = sum(file.present.num_bytes for file in self._store.files.values())
        return present + sum(part.end - part.begin for part in self._busy)

    def _load(self, part: _Part) -> None:
        position = part.begin
        for data in self._readers[part.file.path].read(part.begin, part.end):
            view = memoryview(data)
            with io_errors("writing a part of a source", part.file.path):
                while view:
                    count = os.pwrite(part.file.fd, view, position)
                    position, view = position + count, view[count:]
            if self._ends:
                return
        if position != part.end:
            raise ResourceError("a part of a source did not come whole", where=str(part.file.path))
        with io_errors("writing a part of a source", part.file.path):
            os.fdatasync(part.file.fd)
        with self._changed:
            self._store.keep(part.file, part.begin, part.end)
            self.fetched_bytes += part.end - part.begin


def _parts(file: StoredFile, spans: Iterable[Span]) -> Iterator[_Part]:
    for begin, end in spans:
        for start in range(begin, end, PART_BYTES):
            yield _Part(file, start, min(end, start + PART_BYTES))
