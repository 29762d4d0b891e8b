"""Decides what the backend does next. Pure: no threads, no clock, no state but its queues.

A prefill pass streams all experts once, whatever it computes: so all waiting prompts go into one pass, a
prompt that fits is never cut into chunks, and who shares a prefix with a pass under way waits for it.
Between passes all answers under way are decoded together.
"""

from __future__ import annotations

from collections.abc import Iterator

from krasis.runtime.serving.ids import shared_length
from krasis.runtime.serving.placement import best_source, place
from krasis.runtime.serving.slots import Slot
from krasis.runtime.serving.steps import Job, Keep, Limits, Part, Place, PrefixIndex, Run, Sleep, Step
from krasis.runtime.state.borders import TAIL_TOKENS


class Scheduler:
    """Jobs come by ``add`` and go by ``end``. ``next`` says what to do; the caller does it, reports by
    ``put``, ``kept`` or ``ran``, and asks again. One thread at a time. cuts_tails: whether slots can go
    back over the end of a prompt, wherever a pass ends.
    """

    def __init__(self, limits: Limits, num_slots: int, index: PrefixIndex) -> None:
        self.limits = limits
        self.slots = [Slot(-1 - number) for number in range(num_slots)]
        self.num_joined = 0
        self.cuts_tails = True
        self._index = index
        self._waiting: list[Job] = []
        self._placed: list[Job] = []
        self._num_added = 0
        self._pass_end_s, self._pass_s = 0.0, 0.0

    @property
    def waiting(self) -> tuple[Job, ...]:
        """Jobs without a slot."""
        return tuple(self._waiting)

    @property
    def placed(self) -> tuple[Job, ...]:
        """Jobs with a slot."""
        return tuple(self._placed)

    def add(self, job: Job) -> None:
        """A new job. What the store has for it is not evicted from now on."""
        self._num_added += 1
        job.number = self._num_added
        self._waiting.append(job)
        self._hold(job)

    def next(self, now_s: float) -> Step:
        """What to do now."""
        step = self._placing(now_s)
        if step is not None:
            return step
        answers = [job for job in self._placed if job.remaining == 1]
        prompts = [job for job in self._in_order(self._placed, now_s) if job.remaining > 1]
        if prompts:
            begin_s = self._pass_begin_s(prompts, has_answers=bool(answers))
            if begin_s <= now_s:
                return self._pass(prompts)
            if not answers:
                return Sleep(begin_s)
        if not answers:
            return Sleep(None)
        return Run([_part(job, 1) for job in answers], is_pass=False)

    def between(self) -> Run | None:
        """A step of the answers under way, while a pass is being computed."""
        answers = [job for job in self._placed if job.remaining == 1]
        return Run([_part(job, 1) for job in answers], is_pass=False) if answers else None

    def put(self, job: Job, slot: Slot, num_cached: int) -> None:
        """``Place`` was done: the slot is the job's and holds its first num_cached tokens."""
        self._waiting.remove(job)
        self._placed.append(job)
        self._index.release(job.id)
        job.slot, job.done, job.num_cached = slot, num_cached, num_cached
        marks = slot.marks  # where it can go back to in what it goes on from
        slot.forget()
        slot.marks = None if marks is None else {mark for mark in marks if mark <= num_cached}
        slot.user, slot.is_side, slot.conversation = job.id, job.is_side, job.conversation
        if job.keeps:
            slot.ids, slot.length, slot.num_prompt = job.ids, num_cached, job.num_prompt

    def kept(self, slot: Slot) -> None:
        """``Keep`` was done, whether the store took it or not."""
        slot.num_saved = slot.length
        for job in self._waiting:
            self._hold(job)

    def begin(self, run: Run) -> None:
        """``Run`` is being done."""
        for part in run.parts:
            part.job.has_begun = True

    def ran(self, run: Run, begin_s: float, now_s: float) -> None:
        """``Run`` was done. The caller then adds a token to the ids of each job that goes on, or ends it."""
        for part in run.parts:
            self.advance(part.job, part.rows)
            if part.job.slot is not None:
                part.job.slot.used_s = now_s
        if run.is_pass:
            self._pass_end_s, self._pass_s = now_s, now_s - begin_s

    def advance(self, job: Job, rows: int = 1) -> None:
        """So many more of a job's ids are computed; fewer, if rows is negative."""
        job.done += rows
        if job.slot is not None and job.keeps:
            job.slot.length = job.done

    def end(self, job: Job, now_s: float, length: int | None = None) -> None:
        """The job is over, or was cancelled. Its slot keeps what was computed; length: only so much of it."""
        if job in self._waiting:
            self._waiting.remove(job)
            self._index.release(job.id)
        if job not in self._placed:
            return
        self._placed.remove(job)
        slot = job.slot
        if slot is None:
            return
        slot.user, slot.used_s = "", now_s
        slot.length = min(slot.length, slot.length if length is None else length)
        slot.num_prompt = min(slot.num_prompt, slot.length)
        if not slot.length:
            slot.forget()

    def lose(self, slot: Slot) -> None:
        """The slot cannot be had: there is no memory for it."""
        self.slots.remove(slot)

    def _hold(self, job: Job) -> None:
        self._index.release(job.id)
        found = self._index.match(job.prompt) if job.reads_cache else None
        if found is not None:
            self._index.hold(job.id, found.key)

    def _placing(self, now_s: float) -> Place | Keep | None:
        """The first waiting job that can have a slot and has nothing to wait for."""
        if not self._waiting or not any(slot.is_idle for slot in self.slots):
            return None
        for job in self._in_order(self._waiting, now_s):
            step = None if self._joins(job) else place(job, self.slots, self._index, self._wanted(job))
            if step is not None:
                return step
        return None

    def _wanted(self, job: Job) -> set[Slot]:
        others = (
            best_source(other, self.slots, self._index).slot for other in self._waiting if other is not job
        )
        return {slot for slot in others if slot is not None}

    def _joins(self, job: Job) -> bool:
        """Whether it is better to wait for a prompt that is to be computed, and to go on from its state."""
        if not job.reads_cache:
            return False
        now = -1
        for leader in self._placed:
            if leader.remaining <= 1 or not leader.keeps or leader.done >= leader.num_prompt:
                continue
            coming = min(shared_length(leader.prompt, job.prompt), job.num_prompt - 1)
            if coming <= leader.done:
                continue
            if now < 0:
                now = best_source(job, self.slots, self._index).length
            if self._pays(coming - now, job.num_prompt - coming):
                self.num_joined += not job.has_joined
                job.has_joined = True
                return True
        return False

    def _pays(self, saved: int, rest: int) -> bool:
        """Whether saved rows are worth a pass of rest rows later. One row is no pass: it joins the
        answers."""
        if rest == 1:
            return saved > rest
        return saved >= self.limits.stream_rows or (rest <= self.limits.short_rows < saved)

    def _in_order(self, jobs: list[Job], now_s: float) -> Iterator[Job]:
        def key(job: Job) -> tuple[bool, bool, int, int]:
            is_late = now_s - job.arrived_s > self.limits.patience_s
            return not job.has_begun, not is_late, 0 if is_late else -job.priority, job.number

        return iter(sorted(jobs, key=key))

    def _pass_begin_s(self, prompts: list[Job], *, has_answers: bool) -> float:
        """When a pass with these may begin; it never waits longer than for company, and for fairness."""
        limits, rows = self.limits, sum(job.remaining for job in prompts)
        begin_s = 0.0
        if rows <= limits.short_rows:
            return begin_s
        can_grow = rows < limits.pass_rows and any(slot.is_idle for slot in self.slots)
        if can_grow and not any(job.has_begun for job in prompts):
            begin_s = min(job.arrived_s for job in prompts) + limits.company_s
        if has_answers:
            owed_s = self._pass_s * limits.decode_share / (1 - limits.decode_share)
            begin_s = max(begin_s, self._pass_end_s + owed_s)
        return begin_s

    def _pass(self, prompts: list[Job]) -> Run:
        """As many as fit, in order. Only what is longer than a whole pass is cut, and has a pass to
        itself."""
        room, parts = self.limits.pass_rows, []
        for job in prompts:
            rows = min(job.remaining - self._left(job), self.limits.pass_rows)
            if rows <= room:
                parts.append(_part(job, rows))
                room -= rows
        return Run(parts, is_pass=True)

    def _left(self, job: Job) -> int:
        """Tokens that a pass leaves, where slots go back to the ends of passes alone. The next turn may write
        the end of a prompt in another way, and who asks the same again needs all but the last token: passes
        end before both, and the last token joins the answers.
        """
        if self.cuts_tails:
            return 0
        return TAIL_TOKENS if job.remaining > 2 * TAIL_TOKENS else 1


def _part(job: Job, rows: int) -> Part:
    if job.wants_all and job.done < job.num_prompt:
        return Part(job, job.done, rows, "all")
    return Part(job, job.done, rows, "last" if job.done + rows == len(job.ids) else "none")
