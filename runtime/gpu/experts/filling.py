"""Experts on their way to their places in VRAM while the first prompt already runs: layer by layer, as soon
as each is pinned in host memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from krasis.formats.errors import KrasisError, NativeError
from krasis.formats.process.stages import stage
from krasis.runtime.device.api import Event, Stream
from krasis.runtime.host_memory.api import ExpertStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Move:
    """Experts [first, first + count) of a layer go to the slots from ``slot`` on."""

    layer: int
    first: int
    count: int
    slot: int


def moves_of(experts: Sequence[int], slots: Sequence[int], num_experts: int) -> list[Move]:
    """Rising flat indices of experts (layer * num_experts + expert), each with its slot, in runs as long as
    can be."""
    found: list[Move] = []
    for index, slot in zip(experts, slots, strict=True):
        layer, expert = divmod(index, num_experts)
        last = found[-1] if found else None
        if last is not None and (last.layer, last.first + last.count, last.slot + last.count) == (
            layer,
            expert,
            slot,
        ):
            found[-1] = Move(layer, last.first, last.count + 1, last.slot)
        else:
            found.append(Move(layer, expert, 1, slot))
    return found


class Filling:
    """Carries out moves, in the order of layers, in a thread and on a stream of its own. Begins at once.
    memory u8 [slots, record_bytes], on the device. Close it.
    """

    def __init__(
        self, stream: Stream, store: ExpertStore, memory: torch.Tensor, moves: Sequence[Move]
    ) -> None:
        self._stream, self._store, self._memory, self._moves = stream, store, memory, tuple(moves)
        self._changed = threading.Condition()
        self._events: dict[int, Event] = {}  # after a layer's last copy
        self._last_layer = -1  # all layers up to it are submitted
        self._error: KrasisError | None = None
        self._is_submitted = self._is_stopping = False
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="krasis-fill", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether all copies are known to be done. Does not block."""
        if not self._is_over and self._is_submitted and all(one.is_done() for one in self._events.values()):
            self._is_over = True
        return self._is_over

    def arrive(self, stream: Stream, layer: int) -> None:
        """What is submitted to stream from here on finds the layer's experts in their places. The host waits
        until their copies are submitted. Raises what pinning or copying them raised.
        """
        if self._is_over:
            return
        if layer > self._last_layer:
            with stage("wait for experts on their way to VRAM"), self._changed:
                self._changed.wait_for(lambda: layer <= self._last_layer or self._is_at_end())
        if layer > self._last_layer and not self._is_submitted:
            raise self._error or NativeError("the engine is closed", where=f"experts of layer {layer}")
        event = self._events.get(layer)
        if event is not None:
            stream.wait(event)

    def finish(self) -> None:
        """Blocks until all experts are in their places. Raises as ``arrive``."""
        if self._is_over:
            return
        with stage("wait for all experts on their way to VRAM"):
            self._thread.join()
            if not self._is_submitted:
                raise self._error or NativeError("the engine is closed", where="experts of the GPU")
            self._stream.synchronize()
        self._is_over = True

    def close(self) -> None:
        """Ends it; returns when nothing reads the store any more. Calling it again does nothing."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._stream.synchronize()

    def _is_at_end(self) -> bool:
        return self._is_submitted or self._is_stopping or self._error is not None

    def _run(self) -> None:
        try:
            with stage("(behind) experts to VRAM"):
                self._submit()
        except KrasisError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("a thread that fills the GPU's memory ended unexpectedly")
            self._fail(NativeError("experts could not be copied to the GPU", got=error))

    def _submit(self) -> None:
        for index, move in enumerate(self._moves):
            if self._is_stopping:
                return
            piece = self._store.acquire(move.layer, move.first, move.count)
            slot = move.slot
            for part in piece.parts:
                self._stream.copy(self._memory[slot : slot + len(part)], part)
                slot += len(part)
            event = self._stream.record()
            self._store.release(piece, event)
            self._events[move.layer] = event
            if index + 1 == len(self._moves) or self._moves[index + 1].layer != move.layer:
                self._tell(move.layer)
        with self._changed:
            self._is_submitted = True
            self._changed.notify_all()

    def _tell(self, layer: int) -> None:
        with self._changed:
            self._last_layer = layer
            self._changed.notify_all()

    def _fail(self, error: KrasisError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
