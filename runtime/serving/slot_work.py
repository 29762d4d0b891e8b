"""What is done to slots between batches: opened, filled from elsewhere, kept, saved, mended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from krasis.formats.errors import KrasisError
from krasis.formats.models.state import TAIL_TOKENS
from krasis.runtime.batch import StateStore
from krasis.runtime.serving.api import SlotStatus
from krasis.runtime.serving.ids import Ids
from krasis.runtime.serving.placement import must_be_kept
from krasis.runtime.serving.prefix_folder import Export, PrefixFolder, export_of
from krasis.runtime.serving.prefix_store import Layers, PrefixStore
from krasis.runtime.serving.slots import Slot
from krasis.runtime.serving.state_copy import StateCopier
from krasis.runtime.serving.steps import Source

logger = logging.getLogger(__name__)

CLOSED = -1


class SlotWork:
    """The slots of one state store. num_restored: prefixes that were copied into a slot. refilled: is told of
    slots, by the state store's numbers, that hold what was not computed there.
    """

    def __init__(
        self,
        state: StateStore,
        num_layers: int,
        store: PrefixStore,
        refilled: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._state, self._store, self._refilled = state, store, refilled
        self._copier = StateCopier(state, num_layers)
        self.num_restored = 0

    def open(self, slot: Slot) -> None:
        """Makes sure that it is open. Raises ResourceError if it cannot be had."""
        if slot.number < 0:
            slot.number = self._state.open()

    def fill(self, slot: Slot, source: Source) -> int:
        """Gives a slot the state of source; says how many tokens it then has. What cannot be had is
        computed."""
        try:
            length = self._filled(slot, source)
        except (KrasisError, MemoryError) as error:
            logger.warning("a prefix of %d tokens cannot be taken over: %s", source.length, error)
            length = self._copier.cut(slot.number, 0)
        return length

    def _filled(self, slot: Slot, source: Source) -> int:
        if source.slot is slot:
            return self._copier.cut(slot.number, source.length)
        slot.marks = None  # of what it held
        self._refilled(slot.number)
        if source.slot is not None:
            self.num_restored += 1
            return self._copier.copy(source.slot.number, slot.number, source.length)
        if source.key is None:
            return self._copier.cut(slot.number, 0)
        prefix, layers = self._store.take(source.key)
        self.num_restored += 1
        return self._copier.import_(slot.number, layers, source.length, can_be_cut=prefix.can_be_cut)

    @property
    def cuts_anywhere(self) -> bool:
        """Whether slots can go back to every position, as far as is known."""
        return self._copier.cuts_anywhere

    @property
    def cuts_tails(self) -> bool:
        """Whether they can go back over the end of a prompt, wherever a pass ends."""
        return self._copier.cuts_anywhere or self._copier.keeps_tails

    def mark(self, slots: Iterable[Slot | None]) -> None:
        """Makes where they end now a place to go on from: the end of a prompt, or of an answer."""
        for slot in slots:
            if slot is None or slot.number < 0:
                continue
            try:
                self._state.checkpoint(slot.number)
                if not self._copier.can_be_cut(slot.number):
                    slot.marks = (slot.marks or set()) | self._ends(slot.number)
            except (KrasisError, MemoryError) as error:
                logger.warning("a slot cannot be gone on from its end: %s", error)

    def _ends(self, number: int) -> set[int]:
        """Where a slot ends, and the positions shortly before that it can go back to."""
        end = self._state.length(number)
        near = range(max(1, end - TAIL_TOKENS), end)
        return {end, *(at for at in near if self._state.restorable(number, at) == at)}

    def keep(self, slot: Slot) -> None:
        """Offers the prefix store what the slot holds, if there is room for it."""
        number, held, is_side = slot.number, slot.held, slot.is_side
        num_bytes, can_be_cut = self._copier.num_bytes(number, len(held)), self._copier.can_be_cut(number)
        if self._store.make_room(num_bytes, is_side=is_side, tokens=held if can_be_cut else None):
            layers = self._copier.export(number, len(held))
            self._store.put(held, layers, can_be_cut=can_be_cut, is_side=is_side)

    def recover(self, slot: Slot, length: int) -> int:
        """After a failed batch, or one with guesses: what lies before length is right. Gives how many tokens
        are left."""
        try:
            return self._copier.cut(slot.number, length)
        except (KrasisError, MemoryError) as error:
            logger.warning("a slot is closed after an error: %s", error)
        self.close(slot)
        return 0

    def close(self, slot: Slot) -> None:
        """Gives a slot back whose state is in doubt; ``open`` takes another one."""
        number, slot.number = slot.number, CLOSED
        slot.forget()
        try:
            self._state.close(number)
        except (KrasisError, MemoryError) as error:
            logger.warning("a slot cannot be closed: %s", error)

    def export_of(self, slot: Slot) -> Export:
        """What gives a slot's rows."""
        return partial(self._state.export, slot.number)

    def refill(self, slot: Slot, slots: Sequence[Slot], ids: Ids, layers: Layers) -> None:
        """Gives an idle slot another content; what it held is offered to the prefix store."""
        self.open(slot)
        if must_be_kept(slot, slots, self._store):
            self.keep(slot)
        slot.forget()
        self._refilled(slot.number)
        try:
            self._copier.import_(slot.number, layers, len(ids), can_be_cut=self.cuts_anywhere)
        except (KrasisError, MemoryError):
            self.close(slot)
            raise
        slot.ids, slot.length, slot.num_prompt = ids, len(ids), len(ids)
        slot.marks = None if self.cuts_anywhere else {len(ids)}
        self.num_restored += 1

    def empty(self, slot: Slot) -> None:
        """Makes an idle slot hold nothing."""
        if slot.number >= 0:
            self._copier.cut(slot.number, 0)
        slot.forget()

    def save_all(self, slots: Sequence[Slot], folder: PrefixFolder) -> None:
        """Writes every prefix worth it to the folder, those used last at last."""
        for prefix in self._store:
            if not prefix.is_side and prefix.file is None and prefix.layers is not None:
                folder.save(prefix.tokens, export_of(prefix.layers))
        for slot in sorted(slots, key=lambda one: one.used_s):
            slot.num_saved = 0
            if must_be_kept(slot, slots, self._store):
                folder.save(slot.held, self.export_of(slot))
        folder.prune(can_be_cut=self.cuts_anywhere)

    def status(self, slots: Sequence[Slot]) -> tuple[SlotStatus, ...]:
        """A view of the slots; any thread may ask for it. A job's id is a number and its request's id."""
        return tuple(
            SlotStatus(number, slot.length, slot.user.partition(":")[2], slot.is_side)
            for number, slot in enumerate(slots)
        )

    def usage(self, slots: Sequence[SlotStatus], capacity: int) -> float:
        """The share of all positions that hold something."""
        return sum(one.num_tokens for one in slots) / max(1, len(slots) * capacity)
