"""Keys and values of layers that keep them in the host's memory, while a pass of prefill attends: each
sequence's in turn in one of two buffers in VRAM, copied there ahead, the new ones copied back behind.

What a turn reads of the host is copied on one stream as soon as its buffer is free: while the layers before
it run. What it adds goes back on another, beside the next layer. Both are few bytes beside a pass's experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from krasis.formats.errors import NativeError
from krasis.formats.models.mixers import Attention
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.device.api import Device, Event, Stream
from krasis.runtime.gpu.cache_parts import CachePart

NUM_BUFFERS = 2

HostViews = Callable[[int, int], list[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Turn:
    """One sequence in one layer: reads positions [first, start) that the host has, and adds [start, end)."""

    layer: int
    slot: int
    first: int
    start: int
    end: int


def turns_of(
    spec: ModelSpec, parts: Sequence[CachePart | None], pieces: Iterable[tuple[int, int, int]]
) -> list[Turn]:
    """A pass's turns in their order. pieces: (slot, start, end) of its sequences."""
    found, ranges = [], list(pieces)
    for layer, part in enumerate(parts):
        if part is None or not part.on_host:
            continue
        mixer = spec.layers[layer].mixer
        window = mixer.window if isinstance(mixer, Attention) else None
        for slot, start, end in ranges:
            first = 0 if window is None else max(0, start - window + 1)
            found.append(Turn(layer, slot, first, start, end))
    return found


class KvStaging:
    """parts: of all layers. host: (slot, layer) -> what is kept of it, in the host's memory.

    Raises OutOfDeviceMemoryError.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        parts: Sequence[CachePart | None],
        capacity: int,
        dtype: torch.dtype,
        host: HostViews,
    ) -> None:
        self._host = host
        self._parts = {
            layer: replace(part, keys=0, values=part.values - part.keys)
            for layer, part in enumerate(parts)
            if part is not None and part.on_host
        }
        self._capacity, self._dtype = capacity, dtype
        most = max(part.num_bytes(capacity) for part in self._parts.values())
        self._in, self._out = device.stream("KV in"), device.stream("KV out")
        self.memory = device.empty((NUM_BUFFERS, most), torch.uint8)
        memory = self.memory

        def clear(_: int) -> None:
            memory.zero_()

        stream.launch("clear KV staging", clear, reads=(), writes=(memory,))
        self._free: list[Event] = [stream.record()] * NUM_BUFFERS
        self._waiting: deque[Turn] = deque()
        self._copied: deque[tuple[Turn, int, Event]] = deque()
        self._number = 0
        self._last_in: Event | None = None  # that nobody waited for
        self._last_out: Event | None = None

    def begin(self, compute: Stream, turns: Iterable[Turn]) -> None:
        """A pass. compute: where what the host has was written, and where turns are taken."""
        self.abort()
        self._waiting.extend(turns)
        self._in.wait(compute.record())
        for _ in range(NUM_BUFFERS):
            self._advance()

    def take(self, compute: Stream, layer: int, slot: int) -> list[torch.Tensor]:
        """What is kept of the next turn's sequence, as ``CachePart.views`` has it, to be read and added to on
        compute. Raises NativeError out of turn."""
        if not self._copied or (self._copied[0][0].layer, self._copied[0][0].slot) != (layer, slot):
            raise NativeError("keys and values are used out of turn", where=f"layer {layer}", got=slot)
        _, buffer, copied = self._copied[0]
        compute.wait(copied)
        return self._views(buffer, layer)

    def give_back(self, compute: Stream) -> None:
        """All that reads the turn's buffer, or adds to it, is submitted to compute."""
        turn, buffer, _ = self._copied.popleft()
        self._out.wait(compute.record())
        new = slice(turn.start, turn.end)
        host = self._host(turn.slot, turn.layer)
        _copy(self._out, host, self._views(buffer, turn.layer), new)
        self._free[buffer] = self._last_out = self._out.record()
        self._advance()

    @property
    def is_busy(self) -> bool:
        """Whether a pass is under way, and has turns left."""
        return bool(self._waiting or self._copied)

    def settle(self, stream: Stream) -> None:
        """What is submitted to stream from here on runs after the copies that were submitted."""
        for event in (self._last_in, self._last_out):
            if event is not None:
                stream.wait(event)
        self._last_in = self._last_out = None

    def abort(self) -> None:
        """Forgets a pass that broke off."""
        self._waiting.clear()
        self._copied.clear()

    def _advance(self) -> None:
        """Sends for the next turn, whose buffer has been given back."""
        if not self._waiting:
            return
        turn, buffer = self._waiting.popleft(), self._number % NUM_BUFFERS
        self._number += 1
        self._in.wait(self._free[buffer])
        seen = slice(turn.first, turn.start)
        _copy(self._in, self._views(buffer, turn.layer), self._host(turn.slot, turn.layer), seen)
        self._last_in = copied = self._in.record()
        self._copied.append((turn, buffer, copied))

    def _views(self, buffer: int, layer: int) -> list[torch.Tensor]:
        return self._parts[layer].views(self.memory[buffer], self._capacity, self._dtype)


def _copy(
    stream: Stream, to: Sequence[torch.Tensor], source: Sequence[torch.Tensor], positions: slice
) -> None:
    """Some positions: of each head they lie together."""
    for rows, own in zip(to, source, strict=True):
        for head in range(rows.shape[0] if rows.numel() and positions.start < positions.stop else 0):
            stream.copy(rows[head, positions], own[head, positions])
