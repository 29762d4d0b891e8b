"""Expert groups on their way to the GPU: a stream of copies, always as far ahead as the two buffers allow.

Copy s goes to buffer s % 2 as soon as the products that read copy s - 2 are done: it is enqueued when those
products are, behind an event of theirs, so that neither the host nor a layer's end holds it up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from krasis.formats.errors import NativeError
from krasis.runtime.device.api import Event, Stream
from krasis.runtime.gpu.experts.schedule import NUM_BUFFERS, Group
from krasis.runtime.host_memory.api import ExpertStore


class CopyPipeline:
    """buffers: uint8 [2, places, record_bytes] on the device. stream: for copies alone.

    num_bytes, num_copies: copied since it was made.
    """

    def __init__(self, stream: Stream, store: ExpertStore, buffers: torch.Tensor) -> None:
        self._stream, self._store, self._buffers = stream, store, buffers
        self._waiting: deque[Group] = deque()
        self._copied: dict[int, Event] = {}
        self._held: list[int | None] = [None] * NUM_BUFFERS  # number of the copy a buffer was given to
        self._free: list[Event | None] = [None] * NUM_BUFFERS  # since when its bytes may be overwritten
        self.num_bytes = self.num_copies = 0

    def memory_of(self, group: Group) -> torch.Tensor:
        """The part of its buffer that a group's copy fills."""
        return self._buffers[group.buffer, : group.num_copied]

    def extend(self, groups: Iterable[Group]) -> None:
        """Copies to make after those already asked for, numbered in order from 0 in a pass."""
        self._waiting.extend(groups)
        self._advance()

    def wait_for(self, group: Group, compute: Stream) -> None:
        """What is submitted to compute from here on runs after the group's copy."""
        if group.sequence not in self._copied:
            raise NativeError("a group is used out of turn", where=f"layer {group.layer}", got=group.sequence)
        compute.wait(self._copied.pop(group.sequence))

    def release(self, group: Group, compute: Stream) -> None:
        """All products that read the group are submitted: its buffer is free once they are done."""
        self._free[group.buffer] = compute.record()
        self._held[group.buffer] = None
        self._advance()

    def finish(self) -> None:
        """At the end of a pass. Raises NativeError if a copy was never used."""
        if self._waiting or self._copied or any(held is not None for held in self._held):
            raise NativeError("a pass left copied experts unused", got=len(self._waiting) + len(self._copied))

    def abort(self) -> None:
        """Forgets the pass; the device must be idle."""
        self._waiting.clear()
        self._copied.clear()
        self._held = [None] * NUM_BUFFERS
        self._free = [None] * NUM_BUFFERS

    def _advance(self) -> None:
        while self._waiting and self._held[self._waiting[0].buffer] is None:
            self._issue(self._waiting.popleft())

    def _issue(self, group: Group) -> None:
        free, buffer = self._free[group.buffer], self._buffers[group.buffer]
        if free is not None:
            self._stream.wait(free)
        self._held[group.buffer] = group.sequence
        pieces = []
        for run in group.runs:
            piece = self._store.acquire(group.layer, run.first, run.count)
            pieces.append(piece)
            place = run.place
            for part in piece.parts:
                self._stream.copy(buffer[place : place + len(part)], part)
                place += len(part)
                self.num_bytes += part.numel()
        copied = self._stream.record()
        for piece in pieces:
            self._store.release(piece, copied)
        self._copied[group.sequence] = copied
        self.num_copies += 1
