"""What the GPU runtime asks of a device: memory, streams, events, copies, launches.

Two devices implement it: ``cuda.CudaDevice`` (torch's streams and allocator) and ``double.DeviceDouble``,
which runs the same launches on the CPU, late and in an adversarial order, and raises if one touches memory
without being ordered after what was written there. So everything that a launch reads or writes is named when
it is submitted.

Tensors are torch tensors. A device tensor may be sliced freely: what counts is the bytes a view covers.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

# Enqueues work on the stream whose handle (a cudaStream_t as an integer; 0 on the double) it gets. It may
# call the native library with that handle or torch operators, may allocate temporaries, and writes nothing
# but what was named.
Action = Callable[[int], None]


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Blocks the host until everything submitted before the point is done."""
        ...

    def is_done(self) -> bool:
        """Whether it is, without blocking."""
        ...


class Stream(Protocol):
    """Work that runs in the order of its submission, beside that of other streams."""

    name: str

    def launch(
        self, name: str, action: Action, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        """Submits an action. reads and writes: all device and pinned memory it touches (read-modify-write:
        both).

        On the double the action runs later; whatever Python values it closes over must not change.
        """
        ...

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submits a copy of equal shapes and dtypes, without blocking; host memory must be pinned (or
        registered).

        Raises UsageError for pageable host memory: such a copy would silently block.
        """
        ...

    def record(self) -> Event:
        """A point after everything submitted so far."""
        ...

    def wait(self, event: Event) -> None:
        """What is submitted from here on runs after the event."""
        ...

    def synchronize(self) -> None:
        """Blocks the host until the stream is empty."""
        ...


class Graph(Protocol):
    """Launches captured once, submitted again as one. They keep their tensors and plain values."""

    def replay(self, stream: Stream) -> None:
        """Submits them to a stream."""
        ...


class Device(Protocol):
    """One GPU, or the double of one.

    torch_device: where its tensors live. library: libkrasis_cuda, or the same functions as host code.
    description: one line for logs. total_bytes: of VRAM.
    """

    @property
    def torch_device(self) -> torch.device: ...
    @property
    def library(self) -> ctypes.CDLL: ...
    @property
    def description(self) -> str: ...
    @property
    def total_bytes(self) -> int: ...

    def stream(self, name: str) -> Stream:
        """A new stream."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised device memory (poisoned on the double). Raises OutOfDeviceMemoryError."""
        ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised pinned host memory of exactly that size, which device code may also address directly
        (same address). For small buffers; experts live in ``host_memory``."""
        ...

    def adopt(self, memory: mmap.mmap) -> torch.Tensor:
        """Pins memory that other processes map too, whole pages of it, until ``close``: uint8 [bytes], which
        device code may also address directly. What others do to it is not checked."""
        ...

    def free_bytes(self) -> int:
        """VRAM that can still be allocated."""
        ...

    def host_reads(self, *tensors: torch.Tensor) -> None:
        """Says that the host is about to read pinned memory: an error on the double if a copy into it is not
        known to be done (by ``Event.synchronize`` or ``Stream.synchronize``). Nothing on CUDA."""
        ...

    def host_writes(self, *tensors: torch.Tensor) -> None:
        """Says that the host is about to write pinned memory: likewise for copies out of it."""
        ...

    def flags(self, count: int) -> torch.Tensor:
        """Pinned, zeroed words (int64 [count]) by which host and device code synchronise.

        On the double they are not checked for races; a launch that lists one in ``writes`` releases what came
        before it on its stream, one that lists it in ``reads`` acquires what the host released last.
        """
        ...

    def host_acquires(self, flag: torch.Tensor) -> None:
        """Says that the host saw a flag set: what the launch that set it came after is known to be done."""
        ...

    def host_releases(self, flag: torch.Tensor) -> None:
        """Says that the host is about to set a flag: launches that wait for it may read what it wrote."""
        ...

    def serve(self, host: Callable[[], None]) -> None:
        """Runs ``host``, which waits for flags that submitted work sets and sets flags it waits for, while
        that work runs. Returns when host has returned; on the double, all streams are then empty."""
        ...

    def capture(self, stream: Stream) -> AbstractContextManager[Graph]:
        """What is launched and copied on that stream inside the context is recorded instead of run."""
        ...

    def synchronize(self) -> None:
        """Blocks the host until all streams are empty."""
        ...

    def close(self) -> None:
        """Waits and frees. Calling it again does nothing."""
        ...
