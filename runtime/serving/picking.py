"""Picks a request's tokens: its sampler, with biases, a mask and log probabilities around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import UsageError
from krasis.runtime.batch import Logits
from krasis.runtime.sampler import Sampler
from krasis.runtime.serving.api import Mask, Request, Score

# A forbidden token's logit: finite, as the sampler wants them, and beyond every bias and penalty.
_FORBIDDEN = np.float32(-1e30)


class Picker:
    """One answer's. Raises UsageError for a mask that forbids everything."""

    __slots__ = ("_bias", "_bias_ids", "_is_sampled", "_mask", "_num_top", "_sampler")

    def __init__(self, request: Request) -> None:
        self._sampler = Sampler(request.sampling)
        self._bias_ids = np.fromiter(request.logit_bias.keys(), dtype=np.int64)
        self._bias = np.fromiter(request.logit_bias.values(), dtype=np.float32)
        self._mask: Mask | None = None if request.make_mask is None else request.make_mask()
        self._num_top = request.logprobs
        self._is_sampled = request.sampled_logprobs

    def pick(self, logits: Logits, context: Sequence[int], answer: Sequence[int]) -> tuple[int, Score | None]:
        """The next token and, if they are wanted, its log probabilities. See ``Sampler.pick``."""
        changed = self._changed(logits)
        token = self._sampler.pick(changed, context, answer)
        if self._mask is not None:
            self._mask.accept(token)
        if self._num_top is None:
            return token, None
        if self._is_sampled:
            ids, probabilities = self._sampler.probabilities(changed, context, answer)
            return token, _sampled_score(token, ids, probabilities, self._num_top)
        return token, scores(logits[None], [token], self._num_top)[0]

    def _changed(self, logits: Logits) -> Logits:
        if len(self._bias_ids):
            logits = logits.copy()
            logits[self._bias_ids] += self._bias
        allowed = None if self._mask is None else self._mask.allowed()
        if allowed is None:
            return logits
        allowed = allowed[: len(logits)]
        if not allowed.any():
            raise UsageError("nothing may follow: the grammar of this answer allows no token")
        # NaN and infinity stay, for the sampler to refuse: they are no matter of the mask.
        return np.where(allowed | ~np.isfinite(logits), logits, _FORBIDDEN)


def _sampled_score(
    token: int, ids: npt.NDArray[Any], probabilities: npt.NDArray[np.float64], num_top: int
) -> Score:
    """Of the token that was picked by probabilities of ids, most likely first."""
    place = int(np.flatnonzero(ids == token)[0])
    logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    top = tuple((int(one), float(value)) for one, value in zip(ids[:num_top], logs[:num_top], strict=True))
    return Score(token, float(logs[place]), place + 1, top)


def scores(logits: Logits, tokens: Sequence[int] | npt.NDArray[np.int64], num_top: int) -> list[Score]:
    """Of each row of logits [n, vocab] and the token that follows it."""
    found = []
    for row, token in zip(logits, tokens, strict=True):
        exact = row.astype(np.float64)
        largest = exact.max()
        total = float(largest + np.log(np.exp(exact - largest).sum()))
        top: list[int] = []
        if num_top:
            most = min(num_top, len(row))
            at_least = np.partition(row, len(row) - most)[len(row) - most]
            candidates = np.flatnonzero(row >= at_least)
            top = candidates[np.argsort(-row[candidates], kind="stable")][:most].tolist()
        rank = 1 + int(np.count_nonzero(row > row[token]))
        pairs = tuple((one, float(exact[one]) - total) for one in top)
        found.append(Score(int(token), float(exact[token]) - total, rank, pairs))
    return found
