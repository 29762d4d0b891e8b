"""Streams, events and graphs of the device's double: names for what ``double.DeviceDouble`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from krasis.formats.errors import UsageError
from krasis.runtime.device.api import Action, Event
from krasis.runtime.device.copies import check_copy
from krasis.runtime.device.double_schedule import Operation, Touched
from krasis.runtime.device.ordering import Clock

if TYPE_CHECKING:
    from krasis.runtime.device.double import DeviceDouble


@dataclass(frozen=True, slots=True)
class Submission:
    """What is submitted, at once or by a graph again and again. keep: what must live until it ran."""

    name: str
    action: Action | None = None
    reads: tuple[Touched, ...] = ()
    writes: tuple[Touched, ...] = ()
    keep: tuple[torch.Tensor, ...] = ()


class DoubleEvent:
    """A point in a stream: the operation that stands for it."""

    __slots__ = ("device", "operation")

    def __init__(self, device: DeviceDouble, operation: Operation) -> None:
        self.device, self.operation = device, operation

    def synchronize(self) -> None:
        """Runs what comes before it."""
        self.device.finish(self.operation)

    def is_done(self) -> bool:
        """Whether all that came before it ran; asked often enough, it did."""
        return self.device.poll(self.operation)


class DoubleStream:
    """A queue. clock: what is known to be over for the work submitted last."""

    def __init__(self, device: DeviceDouble, number: int, name: str) -> None:
        self.device, self.number, self.name = device, number, name
        self.clock: Clock = {}
        self.waits: list[Operation] = []
        self.num_unchecked = 0
        self.recording: list[Submission] | None = None

    def launch(
        self, name: str, action: Action, *, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None:
        """Submits an action. Raises OrderingError, and UsageError for memory that is not the device's."""
        find = self.device.find
        submission = Submission(name, action, find(reads, name), find(writes, name), (*reads, *writes))
        self.device.submit(self, submission)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submits a copy. Raises OrderingError; UsageError for memory neither the device's nor pinned."""
        if not source.numel() and not destination.numel():
            return
        reads, writes = self.device.find([source], "copy"), self.device.find([destination], "copy")
        on_device = [allocation.is_device for allocation, _ in (*writes, *reads)]
        check_copy(destination, source, on_device, self.name)
        action = partial(_copy, destination, source)
        self.device.submit(self, Submission("copy", action, reads, writes, (destination, source)))

    def record(self) -> Event:
        """A point after everything submitted so far."""
        return DoubleEvent(self.device, self.device.mark(self))

    def wait(self, event: Event) -> None:
        """What is submitted from here on runs after the event."""
        if not isinstance(event, DoubleEvent) or event.device is not self.device:
            raise UsageError("an event of another device", where=f"stream {self.name}")
        self.device.wait(self, event.operation)

    def synchronize(self) -> None:
        """Runs all of the stream, and of others what it waits for."""
        self.device.finish(self.device.mark(self))


class DoubleGraph:
    """Submissions recorded once."""

    def __init__(self, device: DeviceDouble) -> None:
        self.device = device
        self.submissions: list[Submission] = []

    def replay(self, stream: DoubleStream) -> None:
        """Submits them again, with the same checks."""
        if stream.recording is not None:
            raise UsageError("a graph cannot be captured by another", where=f"stream {stream.name}")
        for submission in self.submissions:
            self.device.submit(stream, submission)


def _copy(destination: torch.Tensor, source: torch.Tensor, _: int) -> None:
    destination.copy_(source)
