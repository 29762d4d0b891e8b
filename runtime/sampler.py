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


class Sampler:
    """One generation's sampler. The same settings, seed and logits give the same tokens (PCG64)."""

    __slots__ = ("_answer", "_context", "_random", "settings")

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        self._context = _Counts(settings.penalty_last_n)
        self._answer = _Counts(settings.penalty_last_n)
        self._random = np.random.Generator(np.random.PCG64(settings.seed))

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
        if self.settings.temperature == 0.0:
            return int(np.argmax(logits))
        ids, probabilities = distribution(logits, self.settings)
        # The inverse of the cumulative distribution; the last entry absorbs what rounding leaves.
        index = int(np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right"))
        return int(ids[min(index, len(ids) - 1)])

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


def distribution(logits: Logits, settings: SamplingSettings) -> tuple[Ids, Probabilities]:
    """(ids, probabilities), most likely first: what a token is drawn from at a temperature above 0."""
    ids = _largest(logits, settings.top_k)
    chosen = logits[ids].astype(np.float64)
    # The difference first: a tiny temperature would make infinities of the logits themselves.
    with np.errstate(over="ignore"):
        weights = np.exp((chosen - chosen[0]) / settings.temperature)
    weights /= weights.sum()
    if settings.top_p < 1.0:
        # A token stays while those before it hold less than top_p; the first always stays.
        before = np.cumsum(weights) - weights
        keep = max(int(np.count_nonzero(before < settings.top_p)), 1)
        ids, weights = ids[:keep], weights[:keep]
    if settings.min_p > 0.0:
        keep = int(np.count_nonzero(weights >= settings.min_p * weights[0]))
        ids, weights = ids[:keep], weights[:keep]
    return ids, weights / weights.sum()


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
