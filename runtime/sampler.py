"""Picks the next token from logits.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p, then one draw; presence and
frequency penalties come right after the repetition penalty, as in llama.cpp. Ties go to the lower id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import NativeError
from krasis.runtime.settings import SamplingSettings

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]
HEAD = 1024  # tokens that are looked at before a whole vocabulary is sorted


class Sampler:
    """One generation's sampler. The same settings, seed and logits give the same tokens (PCG64)."""

    __slots__ = ("_answer", "_context", "_random", "settings")

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        self._context = _Counts(settings.penalty_last_n)
        self._answer = _Counts(settings.penalty_last_n)
        # numpy.random takes 10 ms to import, which greedy answers do without.
        self._random = (
            np.random.Generator(np.random.PCG64(settings.seed)) if settings.temperature != 0.0 else None
        )

    def pick(self, logits: Logits, context: Sequence[int] = (), answer: Sequence[int] = ()) -> int:
        """The next token's id. logits: f32 [vocab], not changed. context: ids the repetition penalty applies
        to: the prompt's and the answer's. answer: those of the answer, to which presence and frequency
        penalties apply. Both only grow from call to call.

        Raises NativeError if the logits hold NaN or infinity.
        """
        if not np.isfinite(logits).all():
            raise NativeError(
                "the model produced NaN or infinite logits",
                hint="an F16 KV cache may be too small for its values (--kv-dtype f32), or its weights are "
                "damaged (krasis-info --verify)",
            )
        logits = self._penalize(logits, context, answer)
        if self._random is None:
            return int(np.argmax(logits))
        return draw(logits, self.settings, self._random.random())

    def probabilities(
        self, logits: Logits, context: Sequence[int] = (), answer: Sequence[int] = ()
    ) -> tuple[Ids, Probabilities]:
        """(ids, probabilities), most likely first, by which ``pick`` picks; its arguments."""
        logits = self._penalize(logits, context, answer)
        if self._random is None:
            return np.array([np.argmax(logits)]), np.ones(1)
        return distribution(logits, self.settings)

    def _penalize(self, logits: Logits, context: Sequence[int], answer: Sequence[int]) -> Logits:
        chosen = self.settings
        if chosen.penalty_last_n == 0:
            return logits
        if chosen.repetition_penalty != 1.0:
            seen = list(self._context.update(context))
            logits = penalize_repetition(logits, seen, chosen.repetition_penalty)
        if chosen.presence_penalty or chosen.frequency_penalty:
            counts = self._answer.update(answer)
            logits = penalize_presence(logits, counts, chosen.presence_penalty, chosen.frequency_penalty)
        return logits


class _Counts:
    """How often each id is among the last ids of a sequence that grows. last: -1 = all of them.

    Counted as it grows: to count an answer of thousands of tokens anew for each of them takes milliseconds.
    """

    __slots__ = ("_counts", "_done", "_last")

    def __init__(self, last: int) -> None:
        self._last = last
        self._counts: dict[int, int] = {}
        self._done = 0

    def update(self, ids: Sequence[int]) -> Mapping[int, int]:
        """The counts with what is new in ids."""
        if len(ids) < self._done:
            self._counts.clear()
            self._done = 0
        for token in ids[self._done :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._last >= 0:
            for token in ids[max(self._done - self._last, 0) : max(len(ids) - self._last, 0)]:
                self._counts[token] -= 1
                if not self._counts[token]:
                    del self._counts[token]
        self._done = len(ids)
        return self._counts


def penalize_repetition(logits: Logits, context: Sequence[int], penalty: float) -> Logits:
    """Divides positive and multiplies negative logits of the ids in context by penalty. Returns a copy if it
    changes any."""
    if penalty == 1.0 or not len(context):
        return logits
    ids = np.unique(np.asarray(context, dtype=np.int64))
    penalized = logits.copy()
    seen = penalized[ids]
    penalized[ids] = np.where(seen > 0, seen / np.float32(penalty), seen * np.float32(penalty))
    return penalized


def penalize_presence(logits: Logits, counts: Mapping[int, int], presence: float, frequency: float) -> Logits:
    """Subtracts presence, and frequency for each time, from the logits of the ids counted (OpenAI's
    definition: logit - count * frequency - (count > 0) * presence, over the tokens sampled so far). Returns a
    copy if it changes any."""
    if not counts or (presence == 0.0 and frequency == 0.0):
        return logits
    ids = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
    times = np.fromiter(counts.values(), dtype=np.float64, count=len(counts))
    penalized = logits.copy()
    penalized[ids] -= (times * frequency + presence).astype(np.float32)
    return penalized


def draw(logits: Logits, settings: SamplingSettings, chance: float, head: int = HEAD) -> int:
    """The token at chance (0 to 1) of the cumulative distribution, most likely first.

    To sort a whole vocabulary takes tens of milliseconds. So where top-k does not bound it, as many as head
    of the most likely tokens are looked at first: nearly always the token is among them.
    """
    if not 0 < settings.top_k < len(logits) and head < len(logits):
        found = _draw_from_head(logits, settings, chance, head)
        if found is not None:
            return found
    ids, probabilities = distribution(logits, settings)
    return _at(ids, probabilities, chance)


def _at(ids: Ids, probabilities: Probabilities, chance: float) -> int:
    """The inverse of the cumulative distribution; the last entry absorbs what rounding leaves."""
    index = int(np.searchsorted(np.cumsum(probabilities), chance, side="right"))
    return int(ids[min(index, len(ids) - 1)])


def _draw_from_head(logits: Logits, settings: SamplingSettings, chance: float, head: int) -> int | None:
    """The same by the head largest logits and the sum of all; None if they do not decide it."""
    weights = _weights(logits.astype(np.float64), float(logits.max()), settings.temperature)
    total = weights.sum()
    ids = _largest(logits, head)
    chosen = weights[ids] / total
    if settings.top_p < 1.0 or settings.min_p > 0.0:
        keep = _num_kept(chosen, settings)
        if keep == head:
            return None
        return _at(ids[:keep], chosen[:keep] / chosen[:keep].sum(), chance)
    return _at(ids, chosen, chance) if chance < chosen.sum() else None


def _weights(logits: Probabilities, largest: float, temperature: float) -> Probabilities:
    # The difference first: a tiny temperature would make infinities of the logits themselves.
    with np.errstate(over="ignore"):
        return np.exp((logits - largest) / temperature)


def _num_kept(probabilities: Probabilities, settings: SamplingSettings) -> int:
    """How many of the most likely tokens top-p, and then min-p, leave; the first always stays."""
    keep = len(probabilities)
    if settings.top_p < 1.0:
        # A token stays while those before it hold less than top_p.
        before = np.cumsum(probabilities) - probabilities
        keep = max(int(np.count_nonzero(before < settings.top_p)), 1)
    if settings.min_p > 0.0:
        keep = int(np.count_nonzero(probabilities[:keep] >= settings.min_p * probabilities[0]))
    return keep


def distribution(logits: Logits, settings: SamplingSettings) -> tuple[Ids, Probabilities]:
    """(ids, probabilities), most likely first: what a token is drawn from at a temperature above 0."""
    ids = _largest(logits, settings.top_k)
    chosen = logits[ids].astype(np.float64)
    weights = _weights(chosen, float(chosen[0]), settings.temperature)
    weights /= weights.sum()
    keep = _num_kept(weights, settings)
    return ids[:keep], weights[:keep] / weights[:keep].sum()


def _largest(logits: Logits, count: int) -> Ids:
    """Ids of the count largest logits (all if 0), largest first, ties by id."""
    if 0 < count < len(logits):
        threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
        candidates = np.flatnonzero(logits >= threshold)
    else:
        candidates = np.arange(len(logits))
        count = len(logits)
    order = np.argsort(-logits[candidates], kind="stable")
    return candidates[order[:count]]
