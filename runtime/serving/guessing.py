"""Guesses in the core's decode steps: a step computes the token that was picked and those that may follow.

They are made while one answer alone is under way: what a guess would share with its token, the rows of other
answers share already. By what passes read (``planning.drafting.draft_gain``) a guess then gains 1.13 to 1.17
in Qwen3-Next 80B, GLM-4.5-Air and DeepSeek-V3, and beside a second answer 1.01 to 1.07: too little.
None between the layers of another's prompt either: there a step delays that prompt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from krasis.formats.errors import NativeError
from krasis.runtime.batch import Batch, Logits, batch_of, one_sequence
from krasis.runtime.drafting import Drafter
from krasis.runtime.serving.model_side import BatchBackend
from krasis.runtime.serving.scheduler import Scheduler
from krasis.runtime.serving.sequence import Sequence
from krasis.runtime.serving.steps import Part, Run
from krasis.runtime.serving.tally import Tally
from krasis.runtime.wider_cache import is_number, nonfinite_logits


class Guessing:
    """Guesses by a backend's drafter, if it has one, and takes tokens by what is computed. Of the core's
    thread. scheduler, tally: are told of guesses that were right.
    """

    def __init__(self, backend: BatchBackend, scheduler: Scheduler, tally: Tally) -> None:
        self._backend, self._scheduler, self._tally = backend, scheduler, tally

    @property
    def _drafter(self) -> Drafter | None:
        return getattr(self._backend, "drafter", None)

    def forget(self, slot: int) -> None:
        """A slot of the state store holds what no pass has made."""
        if self._drafter is not None:
            self._drafter.forget(slot)

    def with_guesses(self, run: Run, sequence: Sequence) -> Run:
        """The step, and what is guessed to follow the token of its first part, which is sequence's."""
        drafter, part = self._drafter, run.parts[0]
        job, slot = part.job, part.job.slot
        if (
            drafter is None
            or run.is_pass
            or len(run.parts) > 1
            or part.start < job.num_prompt
            or slot is None
        ):
            return run
        room = min(self._backend.capacity - part.start - 1, sequence.room - 1)  # one is picked in any case
        if room < 1:
            return run
        held, token = job.ids.first(part.start), int(job.ids.between(part.start, part.start + 1)[0])
        guesses = drafter.propose(held, token, min(drafter.count, room), slot.number)
        return Run([replace(part, guesses=tuple(guesses))], is_pass=False)

    def take(self, part: Part, sequence: Sequence, logits: Logits, now_s: float) -> None:
        """Picks by logits [num_logits, vocab] of the part, whose job has all of its ids computed: one token,
        and one more behind each guess that is picked.
        """
        job, rows = part.job, logits[len(logits) - 1 - len(part.guesses) :]
        if not is_number(rows[0]):
            raise nonfinite_logits(self._backend.kv_dtype)
        sequence.num_drafted += len(part.guesses)
        for row, guess in enumerate((*part.guesses, None)):
            token = sequence.take(rows[row], now_s)
            if token is None:
                return
            job.ids.append(token)
            if token != guess or sequence.ticket.is_cancelled or not is_number(rows[row + 1]):
                return
            sequence.num_accepted += 1
            self._tally.accepted()
            self._scheduler.advance(job)


def batch_of_run(run: Run) -> Batch:
    """What the backend computes of a run. Raises NativeError for a part without a slot."""
    parts = []
    for part in run.parts:
        job, end = part.job, part.start + part.rows
        if job.slot is None:
            raise NativeError("a batch has a sequence without a slot", got=job.id)
        ids = job.ids.between(part.start, end)
        if part.guesses:
            ids = np.concatenate([ids, part.guesses])
            return one_sequence(ids, part.start, "all", job.slot.number, cuts=True)
        parts.append((job.slot.number, part.start, ids, part.logits))
    return batch_of(parts)
