"""All of a rank's experts pinned in host memory: in an arena of our own, or where the bundle's files are
mapped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import KrasisError, UsageError
from krasis.formats.process.stages import stage, tell
from krasis.formats.units import format_bytes
from krasis.runtime.device.api import Event
from krasis.runtime.host_memory.api import (
    MAX_REGISTERED_BYTES,
    Choice,
    ExpertRange,
    LoadReport,
    Method,
    PinnedExperts,
)
from krasis.runtime.host_memory.experts import Experts
from krasis.runtime.host_memory.loader import MAX_PINNING_THREADS, Loader, default_threads
from krasis.runtime.host_memory.memory import tensor_of
from krasis.runtime.host_memory.registrar import Registrar, RegistrationError

Bytes = npt.NDArray[np.uint8]
logger = logging.getLogger(__name__)


class Source(Protocol):
    """Where experts come to lie. read_only: how their memory is registered.

    direct_bytes, cached_bytes, in_place_bytes: as in LoadReport.
    """

    read_only: bool

    @property
    def direct_bytes(self) -> int: ...

    @property
    def cached_bytes(self) -> int: ...

    @property
    def in_place_bytes(self) -> int: ...

    def memory(self, layer: int) -> Bytes:
        """uint8 [num_experts, record_bytes] of a layer, at a page boundary."""
        ...

    def fill(self, layer: int, begin: int, end: int) -> None:
        """Brings bytes [begin, end) of a layer into its memory; called from several threads. Raises
        KrasisError.
        """
        ...

    def replacement(self, layer: int, first: int, count: int) -> Bytes | None:
        """Rows of a layer copied to memory that can surely be registered, after a refusal; None: there is
        none.
        """
        ...

    def close(self) -> None:
        """Closes files and lets go of the memory."""
        ...


class _Part:
    """Rows [first, first + count) of a layer, which are registered as one."""

    __slots__ = ("count", "first", "layer", "registered", "tensor")

    def __init__(self, layer: int, first: int, rows: Bytes) -> None:
        self.layer, self.first, self.count = layer, first, rows.shape[0]
        self.tensor: torch.Tensor | None = tensor_of(rows)
        self.registered = False

    @property
    def end(self) -> int:
        return int(self.first + self.count)


class PinnedStore:
    """See ``ExpertStore``. Loading begins at once."""

    def __init__(
        self,
        experts: Experts,
        source: Source,
        registrar: Registrar,
        choice: Choice,
        *,
        num_threads: int | None = None,
    ) -> None:
        self.record_bytes = experts.record_bytes
        self.first_expert, self.num_experts = experts.first_expert, experts.num_experts
        self.choice = choice
        self._experts, self._source, self._registrar = experts, source, registrar
        self._lock = threading.Lock()
        self._register_s = 0.0
        self._closed = False
        num_parts = -(-experts.layer_bytes // MAX_REGISTERED_BYTES)
        self._rows = min(experts.num_experts, max(1, -(-experts.num_experts // num_parts)))
        self._parts = [
            _Part(layer, first, source.memory(layer)[first : first + self._rows])
            for layer in range(len(experts.layers))
            for first in range(0, experts.num_experts, self._rows)
        ]
        self._parts_a_layer = -(-experts.num_experts // self._rows)
        sizes = [part.count * self.record_bytes for part in self._parts]
        self._loader = Loader(
            sizes, self._fill, self._finish, self._log_end, num_threads or default_threads()
        )
        self._loader.start()

    @property
    def method(self) -> Method:
        """See ``ExpertStore``."""
        return self.choice.method

    @property
    def reason(self) -> str:
        """See ``ExpertStore``."""
        return self.choice.reason

    @property
    def num_bytes(self) -> int:
        """See ``ExpertStore``."""
        return self._experts.num_bytes

    def load_progress(self) -> tuple[int, int]:
        """See ``ExpertStore``."""
        return self._loader.progress()

    @property
    def is_loading(self) -> bool:
        """See ``ExpertStore``."""
        return not self._loader.is_over

    def load_report(self) -> LoadReport:
        """See ``ExpertStore``."""
        done, total = self._loader.progress()
        seconds = max(self._loader.seconds, 1e-9)
        return LoadReport(
            num_bytes=done,
            total_bytes=total,
            seconds=seconds,
            gbps=done / seconds / 1e9,
            direct_bytes=self._source.direct_bytes,
            cached_bytes=self._source.cached_bytes,
            in_place_bytes=self._source.in_place_bytes,
            register_s=self._register_s,
            threads=self._loader.num_threads,
            finished=self._loader.finished,
        )

    def wait_loaded(self) -> None:
        """See ``ExpertStore``."""
        for part in range(len(self._parts)):
            self._loader.wait(part)

    def expect(self, groups: Sequence[ExpertRange]) -> None:
        """Everything is kept: only checks the groups."""
        for group in groups:
            self._experts.check_group(*group)

    def acquire(self, layer: int, first: int, count: int) -> PinnedExperts:
        """See ``ExpertStore``."""
        self._experts.check_group(layer, first, count)
        if self._closed:
            raise UsageError("the store of experts is closed", where="host memory")
        begin = first - self.first_expert
        end = begin + count
        index = layer * self._parts_a_layer
        found = []
        for at in range(index + begin // self._rows, index + (end - 1) // self._rows + 1):
            self._wait(at)
            part = self._parts[at]
            if part.tensor is not None:
                found.append(
                    part.tensor[max(begin, part.first) - part.first : min(end, part.end) - part.first]
                )
        return PinnedExperts(layer, first, count, tuple(found))

    def _wait(self, index: int) -> None:
        if self._loader.is_ready(index):
            return
        with stage("wait for experts to be pinned"):
            self._loader.wait(index)

    def release(self, piece: PinnedExperts, event: Event) -> None:
        """Nothing is overwritten: the event does not matter."""

    def close(self) -> None:
        """See ``ExpertStore``."""
        if self._closed:
            return
        self._closed = True
        self._loader.stop()
        if self._parts:
            # Unpinning reads no byte, but looks at every page: a hundred gigabytes take seconds.
            with ThreadPoolExecutor(min(MAX_PINNING_THREADS, len(self._parts))) as threads:
                list(threads.map(self._unregister, self._parts))
        self._source.close()

    def _fill(self, index: int, begin: int, end: int) -> None:
        part = self._parts[index]
        offset = part.first * self.record_bytes
        self._source.fill(part.layer, offset + begin, offset + end)

    def _finish(self, index: int) -> None:
        part = self._parts[index]
        start = time.perf_counter()
        try:
            self._register(part, read_only=self._source.read_only)
        except RegistrationError as error:
            rows = self._source.replacement(part.layer, part.first, part.count)
            if rows is None:
                raise
            logger.warning(
                "layer %d, experts from %d are copied instead: %s", part.layer, part.first, str(error)
            )
            part.tensor = tensor_of(rows)
            self._register(part, read_only=False)
        with self._lock:
            self._register_s += time.perf_counter() - start

    def _log_end(self) -> None:
        report = self.load_report()
        tell("(behind) experts pinned", time.monotonic() - report.seconds)
        logger.info(
            "host memory: %s of experts pinned (%s) in %.2f s, %.1f GB/s: %s read directly, %s through the "
            "page cache, %s in place; %.2f s in %d registrations (%s) over %d threads",
            format_bytes(report.num_bytes),
            self.method,
            report.seconds,
            report.gbps,
            format_bytes(report.direct_bytes),
            format_bytes(report.cached_bytes),
            format_bytes(report.in_place_bytes),
            report.register_s,
            len(self._parts),
            self._registrar.name,
            report.threads,
        )

    def _register(self, part: _Part, *, read_only: bool) -> None:
        if part.tensor is not None:
            self._registrar.register(part.tensor.view(-1), read_only=read_only)
            part.registered = True

    def _unregister(self, part: _Part) -> None:
        tensor, part.tensor = part.tensor, None
        if not part.registered or tensor is None:
            return
        part.registered = False
        try:
            self._registrar.unregister(tensor.view(-1))
        except KrasisError as error:
            # The memory goes anyway; what is left is to say that the driver disagrees about it.
            logger.warning("host memory: %s", error)
