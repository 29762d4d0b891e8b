"""The double of a device: runs the GPU's programs on the CPU, late, in an adversarial order, and checks them.

Every stream is a queue whose operations run when the host waits for them, or earlier if chance wants it; the
seed decides. Whatever order that was, all accesses are checked by vector clocks (``ordering``): touching
bytes without being ordered after what was done to them raises OrderingError, when it is submitted, or, behind
a flag, when it runs. So does reading what was never written. Memory is poisoned, counted against total_bytes,
and guarded at both ends.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch

from krasis.formats.errors import OutOfDeviceMemoryError, UsageError
from krasis.runtime.device.api import Graph, Stream
from krasis.runtime.device.double_checks import Checks
from krasis.runtime.device.double_memory import DoubleMemory
from krasis.runtime.device.double_schedule import POLICIES, Operation, Schedule, Touched
from krasis.runtime.device.double_streams import DoubleEvent, DoubleGraph, DoubleStream, Submission
from krasis.runtime.device.hidden import hidden
from krasis.runtime.device.library import double_library
from krasis.runtime.device.ordering import OrderingError

__all__ = ["DeviceDouble", "DoubleEvent", "DoubleGraph", "DoubleStream", "OrderingError"]

GIB = 2**30


class DeviceDouble:
    """A device that is not there.

    seed, policy: the order of what is left open (``double_schedule``); a seed alone picks a policy too.
    total_bytes: of its memory. paranoid: while an operation runs, all memory it did not name is poisoned, and
    must be so afterwards (slow: for small programs). refuse: launches of these names run out of memory.
    """

    def __init__(
        self,
        seed: int = 0,
        total_bytes: int = GIB,
        policy: str | None = None,
        paranoid: bool = False,
        refuse: Callable[[str], bool] | None = None,
    ) -> None:
        if policy is not None and policy not in POLICIES:
            raise UsageError("unknown policy", where="DeviceDouble", got=policy, limit=", ".join(POLICIES))
        chosen = policy or ("late", "eager", "random", "random")[seed % 4]
        self.torch_device = torch.device("cpu")
        self.total_bytes = total_bytes
        self.description = f"double of a GPU ({chosen}, seed {seed})"
        self.refuse = refuse
        self.paranoid = paranoid
        self._schedule = Schedule(chosen, seed, self._run)
        self._lock = self._schedule.lock
        self._memory = DoubleMemory(total_bytes)
        self._checks = Checks()
        self._streams: list[DoubleStream] = []
        self._adopted: list[mmap.mmap] = []
        self._is_closed = False

    @property
    def library(self) -> ctypes.CDLL:
        """The kernels as host code. Raises NativeError if they were not built."""
        return double_library()

    @property
    def executed_orders(self) -> list[str]:
        """What ran, in that order, as "name on stream name"."""
        return list(self._schedule.executed)

    @property
    def peak_bytes(self) -> int:
        """The most memory that was allocated at once."""
        return self._memory.peak_bytes

    # ---- the Device protocol ---------------------------------------------------------------------------

    def stream(self, name: str) -> Stream:
        """A new stream."""
        with self._lock:
            self._check_open()
            made = DoubleStream(self, self._schedule.add_stream(), name)
            self._streams.append(made)
            return made

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Poisoned memory. Raises OutOfDeviceMemoryError."""
        with self._lock:
            self._check_open()
            try:
                return self._memory.allocate(shape, dtype, "device")
            except OutOfDeviceMemoryError:
                # What is queued keeps its tensors here; on a real device their memory would be free by now.
                self._schedule.finish_what_can()
            return self._memory.allocate(shape, dtype, "device")

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Poisoned host memory."""
        with self._lock:
            self._check_open()
            return self._memory.allocate(shape, dtype, "pinned")

    def register_host(self, memory: torch.Tensor, *, read_only: bool = False, is_filled: bool = True) -> None:
        """Makes contiguous host memory pinned, contents and all. is_filled: whether they mean anything."""
        with self._lock:
            self._check_open()
            access = self._checks.host_access("the host, before it registered the memory")
            kind = "read-only " if read_only else ""
            label = f"{kind}registered memory of {memory.nbytes} bytes"
            self._memory.register(memory, label, access if is_filled else None)

    def unregister_host(self, memory: torch.Tensor) -> None:
        """Makes it ordinary again. Raises OrderingError if work on it is not known to be done."""
        with self._lock:
            found = self._memory.registered(memory)
            self._checks.host_touches([(found, [(0, found.num_bytes)])], writes=True)
            self._memory.unregister(found)

    def adopt(self, memory: mmap.mmap) -> torch.Tensor:
        """Memory that other processes write too, counted as written already."""
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.register_host(tensor)
        self._adopted.append(memory)
        return tensor

    def free_bytes(self) -> int:
        """Memory that can still be allocated."""
        with self._lock:
            return self.total_bytes - self._memory.used_bytes

    def host_reads(self, *tensors: torch.Tensor) -> None:
        """Says that the host is about to read pinned memory. Raises OrderingError if that is too early."""
        with self._lock:
            self._checks.host_touches(self._find(tensors, "the host"), writes=False)

    def host_writes(self, *tensors: torch.Tensor) -> None:
        """Says that the host is about to write pinned memory. Raises OrderingError if that is too early."""
        with self._lock:
            self._checks.host_touches(self._find(tensors, "the host"), writes=True)

    def flags(self, count: int) -> torch.Tensor:
        """Pinned, zeroed words (int64 [count]): accesses to them order others, and are not checked."""
        with self._lock:
            self._check_open()
            return self._memory.allocate((count,), torch.int64, "flag").zero_()

    def host_acquires(self, flag: torch.Tensor) -> None:
        """Says that the host saw a flag set: what set it, and all before that, is known to be done."""
        with self._lock:
            self._checks.host_acquires(self._find([flag], "flag"))

    def host_releases(self, flag: torch.Tensor) -> None:
        """Says that the host is about to set a flag: what waits for it comes after all the host did."""
        with self._lock:
            self._checks.host_releases(self._find([flag], "flag"))

    def serve(self, host: Callable[[], None]) -> None:
        """Runs host on a thread of its own and the submitted work on this one, until both are at an end.

        Raises the first error of either. One stream at a time may wait for flags: operations run one by one.
        """
        self._check_open()
        with ThreadPoolExecutor(1, "host of the double") as threads:
            future = threads.submit(host)
            with self._lock:
                try:
                    self._schedule.serve(future)
                finally:
                    self._schedule.discard_all()
                    self._checks.gave_up = False
        future.result()

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[Graph]:
        """What is launched and copied on that stream inside the context is recorded instead of run."""
        owned = cast("DoubleStream", stream)
        if owned.recording is not None:
            raise UsageError("the stream is being captured already", where=f"stream {owned.name}")
        graph = DoubleGraph(self)
        owned.recording = graph.submissions
        try:
            yield cast("Graph", graph)
        finally:
            owned.recording = None

    def synchronize(self) -> None:
        """Runs everything. Raises OrderingError if something was written outside of an allocation."""
        with self._lock:
            self._schedule.finish_all()
            self._checks.gave_up = False
            self._checks.host_knows(stream.clock for stream in self._streams)
            self._memory.check_guards()
            damaged, self._memory.damaged = self._memory.damaged, []
        if damaged:
            raise OrderingError("written outside of an allocation", where=", ".join(damaged))

    def close(self) -> None:
        """Runs what is left, and refuses more. Calling it again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self.synchronize()

    # ---- for streams and events ------------------------------------------------------------------------

    def find(self, tensors: Sequence[torch.Tensor], name: str) -> tuple[Touched, ...]:
        """The memory tensors cover. Raises UsageError for memory that is neither the device's nor pinned."""
        with self._lock:
            return self._find(tensors, name)

    def submit(self, stream: DoubleStream, submission: Submission) -> None:
        """Checks it, as far as that can be known now, and queues it; under capture only records it."""
        with self._lock:
            self._submit(stream, submission)

    def mark(self, stream: DoubleStream) -> Operation:
        """An operation that does nothing, at the end of a stream."""
        with self._lock:
            operation = self._submit(stream, Submission("event"))
        if operation is None:
            raise UsageError("a captured stream has no events", where=f"stream {stream.name}")
        return operation

    def wait(self, stream: DoubleStream, operation: Operation) -> None:
        """What is submitted to the stream from here on runs after the operation."""
        if stream.recording is not None:
            raise UsageError("a captured stream cannot wait for events", where=f"stream {stream.name}")
        with self._lock:
            stream.waits.append(operation)

    def finish(self, operation: Operation) -> None:
        """Runs an operation and what comes before it: the host knows then that they are over."""
        with self._lock:
            self._schedule.finish(operation)
            self._checks.host_knows([operation.clock or {}])

    def poll(self, operation: Operation) -> bool:
        """Whether it ran; if so the host knows."""
        with self._lock:
            is_done = self._schedule.poll(operation)
            if is_done:
                self._checks.host_knows([operation.clock or {}])
            return is_done

    # ---- inside: the lock is held ----------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError("the device is closed", where=self.description)

    def _find(self, tensors: Sequence[torch.Tensor], name: str) -> tuple[Touched, ...]:
        return tuple(self._memory.find(tensor, name) for tensor in tensors if tensor.numel())

    def _submit(self, stream: DoubleStream, submission: Submission) -> Operation | None:
        self._check_open()
        if stream.recording is not None:
            if submission.action is not None:
                stream.recording.append(submission)
            return None
        if self.refuse is not None and self.refuse(submission.name):
            raise OutOfDeviceMemoryError("no memory for temporaries", where=submission.name)
        action = submission.action
        operation = Operation(
            stream=stream.number,
            label=f"{submission.name} on stream {stream.name}",
            action=None if action is None else partial(action, 0),
            after=tuple(stream.waits),
            seen=self._checks.known_to_host(),
            keep=submission.keep,
        )
        self._checks.name_accesses(operation, submission.reads, submission.writes)
        is_known = all(before.clock is not None for before in operation.after)
        if stream.num_unchecked or operation.awaits or not is_known:
            stream.num_unchecked += 1
        else:
            self._checks.check(operation, stream.clock)
        stream.waits = []
        self._schedule.submit(operation)
        return operation

    def _run(self, operation: Operation) -> None:
        stream = self._streams[operation.stream]
        was_checked = operation.clock is not None
        if not was_checked and not operation.awaits:
            self._checks.check(operation, stream.clock)
        self._checks.publish(operation)
        if operation.action is not None:
            self._schedule.executed.append(operation.label)
            with self._schedule.unlocked():
                self._act(operation, operation.action)
        if operation.awaits:
            # What it waited for has come only now.
            self._checks.acquire(operation, stream.clock)
            self._checks.check(operation, stream.clock)
            self._checks.publish(operation)
        if not was_checked:
            stream.num_unchecked -= 1

    def _act(self, operation: Operation, action: Callable[[], None]) -> None:
        if not self.paranoid:
            action()
            return
        with self._lock:
            allocations = list(self._memory)
        with hidden(allocations, (*operation.reads, *operation.writes), operation.label):
            action()
