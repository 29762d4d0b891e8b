"""Which slot a request gets, and whose state it goes on from. Pure: it looks and says.

A slot's content is worth what it costs to compute again. So a conversation's next turn takes over its own
slot; a branch (another question on the same system text, a title for the conversation) gets a copy in
another slot; and what has to make room is offered to the prefix store first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from krasis.runtime.serving.slots import Slot
from krasis.runtime.serving.steps import Job, Keep, Place, PrefixIndex, Source

MIN_KEPT_TOKENS = 32  # fewer are computed again sooner than they are looked after
MIN_COPIED_TOKENS = 8
MOST = 0.75  # of what a slot holds


def place(
    job: Job, slots: Sequence[Slot], index: PrefixIndex, wanted: Collection[Slot] = ()
) -> Place | Keep | None:
    """What to do so that the job has a slot: ``Keep`` first, if something would be lost. None: all slots are
    busy. wanted: slots that other waiting jobs would best go on from.
    """
    idle = [slot for slot in _allowed(job, slots) if slot.is_idle]
    if not idle:
        return None
    source = best_source(job, slots, index)
    here = source.slot
    if here in idle and here is not None and _may_take_over(job, here, source.length):
        return Place(job, here, source)
    slot = min(idle, key=lambda one: _worth(one, wanted))
    if must_be_kept(slot, slots, index):
        return Keep(slot)
    return Place(job, slot, source)


def _allowed(job: Job, slots: Sequence[Slot]) -> Sequence[Slot]:
    """The slots that the job may have."""
    if job.pinned is None or not 0 <= job.pinned < len(slots):
        return slots
    return [slots[job.pinned]]


def best_source(job: Job, slots: Iterable[Slot], index: PrefixIndex) -> Source:
    """The most that can be taken over now. Of equals: a slot that can be gone on in, any slot, the store."""
    best = Source()
    if not job.reads_cache:
        return best
    rank = (0, False, False)
    for slot in slots:
        length = slot.shared(job.prompt)
        in_place = slot.is_idle and _may_take_over(job, slot, length)
        least = 1 if in_place else MIN_COPIED_TOKENS
        if length >= least and (length, in_place, True) > rank:
            rank, best = (length, in_place, True), Source(length, slot=slot)
    found = index.match(job.prompt)
    if found is not None and found.length >= MIN_COPIED_TOKENS and (found.length, False, False) > rank:
        best = Source(found.length, key=found.key)
    return best


def _may_take_over(job: Job, slot: Slot, length: int) -> bool:
    """Whether the job may overwrite what the slot holds beyond length without a copy of it."""
    if slot.is_side:
        return True
    if job.is_side or not job.keeps:
        return False
    if slot.length - length <= MIN_KEPT_TOKENS or length >= slot.num_prompt:
        return True  # only the last answer, which the next turn writes its own way
    # A turn may drop the thinking of turns before. Agents of one session share its name, and not much else.
    is_most = length >= MOST * slot.length
    return is_most and bool(slot.conversation) and slot.conversation == job.conversation


def _worth(slot: Slot, wanted: Collection[Slot]) -> tuple[bool, bool, bool, float]:
    """The least is given up first."""
    return slot in wanted, slot.length > 0, not slot.is_side, slot.used_s


def must_be_kept(slot: Slot, slots: Iterable[Slot], index: PrefixIndex) -> bool:
    """Whether something would be lost with what the slot holds."""
    if slot.is_side or slot.length < MIN_KEPT_TOKENS or slot.num_saved >= slot.length:
        return False
    held = slot.held
    elsewhere = (
        other.length >= len(held) and bool(np.array_equal(other.held[: len(held)], held))
        for other in slots
        if other is not slot
    )
    return not any(elsewhere) and not index.covers(held)
