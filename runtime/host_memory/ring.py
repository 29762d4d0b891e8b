"""A ring: a few pinned slots that a thread fills ahead from the bundle's files, in the announced order.

For machines whose RAM cannot pin every expert. What the page cache can keep is read through it and stays; the
rest is read directly each time, so that one pass does not push out of the cache what the next one begins
with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import KrasisError, NativeError, ResourceError, UsageError
from krasis.formats.units import format_bytes
from krasis.runtime.device.api import Device, Event
from krasis.runtime.host_memory.api import Choice, ExpertRange, LoadReport, Method, PinnedExperts
from krasis.runtime.host_memory.experts import Experts
from krasis.runtime.host_memory.loader import CHUNK_BYTES, default_threads, forget_frames
from krasis.runtime.host_memory.registrar import Registrar
from krasis.runtime.host_memory.shards import Shards
from krasis.runtime.host_memory.slots import Slot, State

Bytes = npt.NDArray[np.uint8]
logger = logging.getLogger(__name__)

LEAST_SLOTS = 2
MOST_SLOTS = 16


class RingStore:
    """See ``ExpertStore``. ring_bytes: of all slots; group_experts: of the largest group, until ``expect``
    says more.

    cache_bytes: how many bytes of the experts the page cache is expected to keep.
    """

    def __init__(
        self,
        experts: Experts,
        shards: Shards,
        device: Device,
        registrar: Registrar,
        choice: Choice,
        *,
        ring_bytes: int,
        group_experts: int,
        cache_bytes: int = 0,
        num_threads: int | None = None,
    ) -> None:
        """Raises ResourceError if ring_bytes cannot hold two groups, or memory cannot be had."""
        self.record_bytes = experts.record_bytes
        self.first_expert, self.num_experts = experts.first_expert, experts.num_experts
        self.choice = choice
        self._experts, self._shards, self._device, self._registrar = experts, shards, device, registrar
        self._ring_bytes, self._cache_bytes = ring_bytes, cache_bytes
        self._pending: deque[tuple[int, ExpertRange]] = deque()  # (order, group) still to be read
        self._next_order = 0
        self._is_urgent = False  # somebody waits for the first of the pending groups
        self._changed = threading.Condition()
        self._error: KrasisError | None = None
        self._closing = False
        self._begin_s = time.perf_counter()
        self._slots: list[Slot] = []
        self._num_threads = num_threads or default_threads()
        self._cut(group_experts)
        self._readers = ThreadPoolExecutor(self._num_threads, thread_name_prefix="krasis-ring")
        self._thread = threading.Thread(target=self._run, name="krasis-ring", daemon=True)
        self._thread.start()

    @property
    def num_bytes(self) -> int:
        """See ``ExpertStore``."""
        return sum(slot.rows.nbytes for slot in self._slots)

    @property
    def num_slots(self) -> int:
        """How many groups it holds."""
        return len(self._slots)

    @property
    def method(self) -> Method:
        """See ``ExpertStore``."""
        return "ring"

    @property
    def reason(self) -> str:
        """See ``ExpertStore``."""
        return self.choice.reason

    def load_progress(self) -> tuple[int, int]:
        """Nothing is loaded once and for all."""
        return 0, 0

    @property
    def is_loading(self) -> bool:
        """Nothing is loaded once and for all."""
        return False

    def load_report(self) -> LoadReport:
        """What was read so far, pass after pass."""
        seconds = time.perf_counter() - self._begin_s
        direct, cached = self._shards.direct_bytes, self._shards.cached_bytes
        rate = (direct + cached) / max(seconds, 1e-9) / 1e9
        return LoadReport(direct + cached, 0, seconds, rate, direct, cached, 0, 0.0, self._num_threads, True)

    def wait_loaded(self) -> None:
        """Nothing to wait for."""

    def expect(self, groups: Sequence[ExpertRange]) -> None:
        """See ``ExpertStore``. What was announced before is forgotten; what was read already is kept if it
        comes soon.
        """
        for group in groups:
            self._experts.check_group(*group)
        with self._changed:
            self._raise_if_broken()
            self._pending.clear()
            for slot in self._slots:
                slot.is_wanted = False
        self._fit(max((count for _, _, count in groups), default=1))
        with self._changed:
            self._pending.extend(self._number(group) for group in groups)
            self._keep_what_comes_soon()
            self._changed.notify_all()

    def acquire(self, layer: int, first: int, count: int) -> PinnedExperts:
        """See ``ExpertStore``. Raises UsageError if every slot is held: two groups at least can be."""
        group = (layer, first, count)
        self._experts.check_group(*group)
        with self._changed:
            if self._find(group) is None:
                self._raise_if_broken()
            fits = all(count <= slot.rows.shape[0] for slot in self._slots)
        if not fits:
            self._fit(count)
        with self._changed:
            if self._find(group) is None:
                self._make_urgent(group)
            self._changed.wait_for(lambda: self._find(group, State.FULL) or self._error or self._closing)
            slot = self._find(group, State.FULL)
            if slot is None:  # what was read before a failure is still given out
                self._raise_if_broken()
                raise NativeError("a slot of the ring was lost", where="host memory")
            slot.state = State.HELD
            return PinnedExperts(layer, first, count, slot.parts_of(count), self._slots.index(slot))

    def release(self, piece: PinnedExperts, event: Event) -> None:
        """See ``ExpertStore``."""
        with self._changed:
            if not 0 <= piece.slot < len(self._slots) or self._slots[piece.slot].state is not State.HELD:
                raise UsageError("this piece is not held", where="host memory", got=f"slot {piece.slot}")
            slot = self._slots[piece.slot]
            slot.state, slot.event = State.DRAINING, event
            self._changed.notify_all()

    def close(self) -> None:
        """See ``ExpertStore``."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._readers.shutdown()
        forget_frames(self._error)
        self._free_slots()
        self._shards.close()

    # ---- slots

    def _cut(self, group_experts: int) -> None:
        """Makes slots of that many experts, freeing those there were."""
        group_bytes = group_experts * self.record_bytes
        num_slots = min(self._ring_bytes // group_bytes, MOST_SLOTS)
        if num_slots < LEAST_SLOTS:
            raise ResourceError(
                "the pinned ring is too small for two groups of experts",
                where="host memory",
                got=f"{self._ring_bytes} bytes",
                limit=f"{LEAST_SLOTS * group_bytes} bytes for {group_experts} experts of {self.record_bytes}",
                hint="use smaller groups, or allow more RAM",
            )
        self._free_slots()
        try:
            for _ in range(num_slots):
                self._slots.append(Slot(group_experts, self.record_bytes, self._registrar))
        except KrasisError as error:
            self._free_slots()
            self._error = error
            raise
        logger.info(
            "ring: %d slots of %d experts, %s", num_slots, group_experts, format_bytes(self.num_bytes)
        )

    def _free_slots(self) -> None:
        for slot in self._slots:
            slot.free()
        self._slots = []

    def _fit(self, count: int) -> None:
        """Cuts the slots anew if the largest group does not fit, or leaves more than half of each empty."""
        with self._changed:
            rows = self._slots[0].rows.shape[0]
            if count <= rows and (2 * count > rows or len(self._slots) == MOST_SLOTS):
                return
            if any(slot.state is State.HELD for slot in self._slots):
                if count <= rows:
                    return
                raise UsageError(
                    "a group larger than the ring's slots was asked for while others are held",
                    where="host memory",
                    got=f"{count} experts",
                    limit=f"{rows} experts",
                    hint="announce groups by expect()",
                )
            waiting, self._pending = self._pending, deque()
            for slot in self._slots:
                slot.is_wanted = False
            self._changed.wait_for(
                lambda: (
                    all(slot.state is not State.FILLING for slot in self._slots)
                    or self._error
                    or self._closing
                )
            )
            self._raise_if_broken()
            # With nothing pending the reader sleeps: the slots are ours.
            for slot in self._slots:
                if slot.event is not None:
                    slot.event.synchronize()
            self._cut(count)
            self._pending = waiting
            self._changed.notify_all()

    def _find(self, group: ExpertRange, state: State | None = None) -> Slot | None:
        """The first slot in order that has the group, or will."""
        wanted = (state,) if state else (State.FILLING, State.FULL)
        found = [s for s in self._slots if s.state in wanted and s.is_wanted and s.group == group]
        return min(found, key=lambda slot: slot.order, default=None)

    def _number(self, group: ExpertRange) -> tuple[int, ExpertRange]:
        self._next_order += 1
        return self._next_order, group

    def _keep_what_comes_soon(self) -> None:
        """Slots read ahead for another announcement stay, if their group is among the first of this one."""
        soon = [self._pending[index] for index in range(min(len(self._slots), len(self._pending)))]
        for slot in self._slots:
            if slot.state not in (State.FILLING, State.FULL):
                continue
            match = next((item for item in soon if item[1] == slot.group), None)
            if match is not None:
                soon.remove(match)
                self._pending.remove(match)
                slot.order, slot.is_wanted = match[0], True
            elif slot.state is State.FULL:
                slot.state = State.FREE

    def _make_urgent(self, group: ExpertRange) -> None:
        """Puts a group first among those to be read; the reader makes room for it."""
        if all(slot.state is State.HELD for slot in self._slots):
            raise UsageError(
                "every slot of the ring is held", where="host memory", got=f"{self.num_slots} slots"
            )
        announced = next((item for item in self._pending if item[1] == group), None)
        if announced is not None:
            self._pending.remove(announced)
        # Below every order given out: it is wanted now.
        self._pending.appendleft((announced[0] if announced else 0, group))
        self._is_urgent = True
        self._changed.notify_all()

    def _raise_if_broken(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing:
            raise UsageError("the store of experts is closed", where="host memory")

    # ---- the reader

    def _run(self) -> None:
        done = False
        try:
            while (slot := self._next_slot()) is not None:
                self._read(slot)
            done = True
        except KrasisError as error:
            self._fail(error)
            done = True
        finally:
            if not done:
                self._fail(NativeError("the ring's reader ended unexpectedly", where="host memory"))

    def _next_slot(self) -> Slot | None:
        """A slot to fill, taken for the next group; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (self._pending and self._choose() is not None))
            slot = self._choose()
            if self._closing or slot is None:
                return None
            event = slot.event
            order, group = self._pending.popleft()
            self._is_urgent = False  # what was urgent was the first
            if slot.state is State.FULL:
                logger.debug("ring: %s makes room for %s", slot.group, group)
                self._pending.appendleft((slot.order, slot.group))
            slot.take(group, order)
        if event is not None:
            event.synchronize()
        return slot

    def _choose(self) -> Slot | None:
        """A free slot, else one whose event is done, else the one given back first; for an urgent group, at
        last, the one that is needed latest.
        """
        free = next((slot for slot in self._slots if slot.state is State.FREE), None)
        if free is not None:
            return free
        draining = [slot for slot in self._slots if slot.state is State.DRAINING]
        if draining:
            draining.sort(key=lambda slot: slot.order)
            done = (slot for slot in draining if slot.event is None or slot.event.is_done())
            return next(done, draining[0])
        full = [slot for slot in self._slots if slot.state is State.FULL]
        return max(full, key=lambda slot: slot.order, default=None) if self._is_urgent else None

    def _read(self, slot: Slot) -> None:
        layer, first, count = slot.group
        self._device.host_writes(slot.tensor)
        begin = (first - self.first_expert) * self.record_bytes
        flat = slot.rows.reshape(-1)[: count * self.record_bytes]
        position = layer * self._experts.layer_bytes + begin
        keep = position + flat.size <= self._cache_bytes

        def read(at: int) -> None:
            self._shards.read(layer, begin + at, flat[at : at + CHUNK_BYTES], keep=keep)

        for _ in self._readers.map(read, range(0, flat.size, CHUNK_BYTES)):
            pass
        with self._changed:
            slot.state = State.FULL if slot.is_wanted else State.FREE
            self._changed.notify_all()

    def _fail(self, error: KrasisError) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()
