"""Hot experts in VRAM: a pool of slots, a table of who is where, and swaps between tokens that never block.

Who sees what when. Launches read ``table`` and ``mask`` on the compute stream and nowhere else, and they are
written there by copies, so a launch sees all of an update or nothing. A swap takes at least two token
boundaries: at the first the victim leaves the tables, and its slot is overwritten on the copy stream behind
that update, when nothing that is submitted can still read it; at the next after the copy has arrived, the
newcomer enters the tables. In between the slot belongs to nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from krasis.formats.errors import NativeError, UsageError
from krasis.runtime.device.api import Device, Event, Stream
from krasis.runtime.gpu.experts.filling import Filling, moves_of
from krasis.runtime.gpu.experts.residency_policy import Frequencies, Swap, plan_swaps
from krasis.runtime.host_memory.api import ExpertStore

logger = logging.getLogger(__name__)

MAX_SWAPS = 4  # victims a boundary: more would be noise
MIN_COPIES, MAX_COPIES = 4, 64  # under way at once
NOTE_TOKENS = 16  # decoded tokens between two looks at the counts


@dataclass(frozen=True, slots=True)
class _Arriving:
    """An expert (flat index) on its way to a slot."""

    expert: int
    slot: int
    event: Event | None


class Residency:
    """num_slots experts of this rank in VRAM.

    Layers are those that have experts. memory u8 [num_slots, record_bytes]; table i64 [layers, experts]:
    addresses of records in memory, 0 where an expert is not resident; mask u8 [layers, experts]; counts i64
    [layers, experts]: what ``route`` adds to; all on the device. host_addresses i64 [layers, experts]: the
    table as the next launch will see it. num_swaps, num_fills, num_tables
    (that were written): so far.
    """

    def __init__(
        self,
        device: Device,
        store: ExpertStore,
        copy_stream: Stream,
        num_layers: int,
        num_experts: int,
        num_slots: int,
    ) -> None:
        """Raises OutOfDeviceMemoryError, and UsageError for more slots than the store has experts."""
        own = range(store.first_expert, store.first_expert + store.num_experts)
        if not 0 < num_slots <= num_layers * len(own):
            limit = num_layers * len(own)
            raise UsageError("impossible number of resident experts", got=num_slots, limit=limit)
        shape = (num_layers, num_experts)
        self._device, self._store, self._copies, self._shape = device, store, copy_stream, shape
        self.num_slots = num_slots
        self.memory = device.empty((num_slots, store.record_bytes), torch.uint8)
        self.table = device.empty(shape, torch.int64)
        self.mask = device.empty(shape, torch.uint8)
        self.counts = device.empty(shape, torch.int64)
        self._table_staging = device.pinned(shape, torch.int64)
        self._mask_staging = device.pinned(shape, torch.uint8)
        self._counts_staging = device.pinned(shape, torch.int64)
        self.host_addresses: npt.NDArray[np.int64] = np.zeros(shape, np.int64)
        self._allowed = np.zeros(shape, bool)
        self._allowed[:, own.start : own.stop] = True
        self._num_own = num_layers * len(own)
        self._slot_of = np.full(num_layers * num_experts, -1)  # also of those on their way
        self._free = list(range(num_slots))[::-1]
        self._in_use: tuple[torch.Tensor, ...] = ()
        self._arriving: list[_Arriving] = []
        self._filling: Filling | None = None
        self._frequencies = Frequencies(num_layers * num_experts)
        self._published: Event | None = None
        self._noted: tuple[Event, int] | None = None
        self._unnoted_tokens = 0
        self._max_copies = MIN_COPIES
        self.num_swaps = self.num_fills = self.num_tables = 0
        self._is_new = self._is_stale = True
        self._is_held = False

    @property
    def is_complete(self) -> bool:
        """Whether every expert is resident: then nothing ever changes."""
        return bool((self.host_addresses != 0).all())

    @property
    def has_all_own(self) -> bool:
        """Whether every expert of this rank is resident: then nothing ever changes."""
        return self.num_resident == self._num_own

    @property
    def num_resident(self) -> int:
        """Experts in the table."""
        return int(np.count_nonzero(self.host_addresses))

    @property
    def memory_in_use(self) -> tuple[torch.Tensor, ...]:
        """The parts of ``memory`` that the tables point to: what launches may read. Others may be written
        meanwhile."""
        return self._in_use

    def prepare(self, stream: Stream) -> None:
        """Before the first launch that reads the tables or adds to counts: writes them."""
        if self._is_new:
            self._clear_counts(stream)
            self._publish(stream)
            self._is_new = False

    def note_tokens(self, stream: Stream, num_tokens: int) -> None:
        """num_tokens more tokens were routed by launches on stream that added to ``counts``. Never blocks:
        while the last counts have not been looked at, new ones wait on the device."""
        self.prepare(stream)
        self._unnoted_tokens += num_tokens
        self._look()
        if self._noted is not None:
            return
        self._device.host_writes(self._counts_staging)
        stream.copy(self._counts_staging, self.counts)
        self._clear_counts(stream)
        self._noted = (stream.record(), self._unnoted_tokens)
        self._unnoted_tokens = 0

    def after_token(self, stream: Stream) -> None:
        """After each decoded token, between two graphs. Costs nothing to speak of most of the time."""
        if self.has_all_own:
            return
        if self._is_held:
            self._unnoted_tokens += 1
            return
        if self._unnoted_tokens + 1 >= NOTE_TOKENS:
            self.note_tokens(stream, 1)
        else:
            self._unnoted_tokens += 1
        if self._arriving or self._noted is not None:
            self.update(stream)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, a pass reads the addresses: tokens that are decoded meanwhile are only counted."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def update(self, stream: Stream) -> None:
        """Between passes or tokens: lets in what has arrived, starts a few copies. Never blocks on the GPU.

        stream: the compute stream.
        """
        self.prepare(stream)
        if self._published is not None and not self._published.is_done():
            return  # the staging tables are still being read
        looked = self._look()
        arrived = self._take_arrived()
        swaps = self._plan() if looked or arrived or self._free else []
        for swap in swaps:
            if swap.victim is not None:
                self._evict(swap.victim)
        if self._is_stale:
            self._publish(stream)
        if swaps:
            self._start(stream, [swap.newcomer for swap in swaps])

    def fill(self, stream: Stream) -> None:
        """Fills all free slots, with the most used experts, then by number. They come in the background, by
        layers, and count as resident at once: ``arrive`` before a launch that reads a layer's, ``finish``
        before one that may read any. From a ring they come now."""
        self.prepare(stream)
        self._look()
        values = self._frequencies.values
        candidates = np.flatnonzero((self._slot_of < 0) & self._allowed.reshape(-1))
        # Unused ones in the order of the layers' experts, layer by layer: every layer gets its share.
        by_number = candidates[np.argsort(candidates % self._shape[1], kind="stable")]
        order = by_number[np.argsort(-values[by_number], kind="stable")]
        chosen = np.sort(order[: len(self._free)]).tolist()
        if self._store.method == "ring":
            self._start(stream, chosen)
            for arriving in self._arriving:
                if arriving.event is not None:
                    stream.wait(arriving.event)
                self._enter(arriving)
            self._arriving = []
        else:
            self._begin_filling(stream, chosen)
        if self._published is not None:
            self._published.synchronize()
        self._publish(stream)
        logger.info("%d of %d experts are resident in VRAM", self.num_resident, self.host_addresses.size)

    def arrive(self, stream: Stream, layer: int) -> None:
        """What is submitted to stream from here on finds the layer's resident experts. Raises what became of
        them instead."""
        if self._filling is not None:
            self._filling.arrive(stream, layer)

    def finish(self) -> None:
        """Blocks until all that is resident has arrived. Raises as ``arrive``."""
        if self._filling is not None:
            self._filling.finish()

    def close(self) -> None:
        """Waits for copies under way: their sources may be freed then."""
        if self._filling is not None:
            self._filling.close()
        self._copies.synchronize()
        self._arriving = []

    # ---- counts --------------------------------------------------------------------------------------------

    def _clear_counts(self, stream: Stream) -> None:
        counts = self.counts

        def clear(_: int) -> None:
            counts.zero_()

        stream.launch("clear expert counts", clear, reads=(), writes=(counts,))

    def _look(self) -> bool:
        """Takes in the counts that were noted, if they have come."""
        if self._noted is None or not self._noted[0].is_done():
            return False
        self._device.host_reads(self._counts_staging)
        self._frequencies.add(self._counts_staging.numpy().reshape(-1), self._noted[1])
        self._noted = None
        return True

    # ---- swaps ---------------------------------------------------------------------------------------------

    def _plan(self) -> list[Swap]:
        if self._filling is not None and not self._filling.is_over:
            return []  # a victim may still be on its way
        if self._store.method == "ring":
            limit = 1  # each is read from the disk, and the host waits for it
        else:
            ready, total = self._store.load_progress()
            if ready < total:
                return []  # an expert that is not loaded yet would block the host
            limit = self._max_copies
        resident = self._slot_of >= 0
        return plan_swaps(
            self._frequencies,
            resident,
            movable=(self.host_addresses != 0).reshape(-1),
            allowed=self._allowed.reshape(-1),
            num_free=len(self._free),
            max_swaps=min(limit - len(self._arriving), len(self._free) + MAX_SWAPS),
        )

    def _evict(self, expert: int) -> None:
        self._is_stale = True
        self.host_addresses.reshape(-1)[expert] = 0
        self._free.append(int(self._slot_of[expert]))
        self._slot_of[expert] = -1
        self.num_swaps += 1

    def _start(self, stream: Stream, experts: list[int]) -> None:
        """Copies experts to free slots, behind all that stream has to do: it may read their old owners."""
        self._store.expect([(*divmod(expert, self._shape[1]), 1) for expert in experts])
        self._copies.wait(stream.record())
        for expert in experts:
            piece = self._store.acquire(*divmod(expert, self._shape[1]), 1)
            slot = self._free.pop()
            for part in piece.parts:
                self._copies.copy(self.memory[slot : slot + 1], part)
            event = self._copies.record()
            self._store.release(piece, event)
            self._slot_of[expert] = slot
            self._arriving.append(_Arriving(expert, slot, event))
            self.num_fills += 1

    def _begin_filling(self, stream: Stream, experts: list[int]) -> None:
        """Behind all that stream has to do."""
        self.finish()
        slots = [self._free.pop() for _ in experts]
        fill = self._device.stream("fill")
        fill.wait(stream.record())
        for expert, slot in zip(experts, slots, strict=True):
            self._slot_of[expert] = slot
            self._enter(_Arriving(expert, slot, None))
            self.num_fills += 1
        moves = moves_of(experts, slots, self._shape[1])
        self._filling = Filling(fill, self._store, self.memory, moves)

    def _take_arrived(self) -> bool:
        """Lets in the experts whose copies are done. Copies that are all done by the next boundary may be
        more, ones that are not must be fewer: the link is then busy for longer than a token."""
        if not self._arriving:
            return False
        done = [one for one in self._arriving if one.event is None or one.event.is_done()]
        if len(done) == len(self._arriving):
            self._max_copies = min(2 * self._max_copies, MAX_COPIES)
        else:
            self._max_copies = max(self._max_copies // 2, MIN_COPIES)
        for one in done:
            self._enter(one)
        self._arriving = [one for one in self._arriving if one not in done]
        return bool(done)

    def _enter(self, one: _Arriving) -> None:
        if self._slot_of[one.expert] != one.slot:
            raise NativeError("an expert arrived where it was not sent", where="residency", got=one.expert)
        self._is_stale = True
        self.host_addresses.reshape(-1)[one.expert] = self.memory[one.slot].data_ptr()

    def _publish(self, stream: Stream) -> None:
        """The tables as launches see them from here on."""
        self._device.host_writes(self._table_staging, self._mask_staging)
        np.copyto(self._table_staging.numpy(), self.host_addresses)
        np.copyto(self._mask_staging.numpy(), self.host_addresses != 0)
        stream.copy(self.table, self._table_staging)
        stream.copy(self.mask, self._mask_staging)
        self._published = stream.record()
        self._in_use = self._runs_in_use()
        self._is_stale = False
        self.num_tables += 1

    def _runs_in_use(self) -> tuple[torch.Tensor, ...]:
        used = np.zeros(self.num_slots + 2, np.int8)
        used[self._slot_of[(self.host_addresses != 0).reshape(-1)] + 1] = 1
        edges = np.flatnonzero(np.diff(used)).reshape(-1, 2)
        return tuple(self.memory[begin:end] for begin, end in edges.tolist())
