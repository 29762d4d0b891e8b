"""How often tokens chose each expert in the passes before, and what that lets expect of the next. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

PRIOR_TOKENS = 64  # that choose evenly, as if they had been seen before all others
REMEMBERED_TOKENS = 4096  # of so many the first half counts half
LEAST_CHANCE = 0.5  # with less a copy may be in the way of those that were chosen


class ExpertHabits:
    """top_k: experts that a token chooses of a layer's num_experts."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int) -> None:
        self._counts = np.zeros((num_layers, num_experts))
        self._num_tokens = 0.0
        self._even = top_k / num_experts

    def note(self, counts: npt.NDArray[np.int32], num_tokens: int) -> None:
        """A pass of num_tokens tokens chose each expert so often: counts [layers, experts]."""
        kept = 0.5 ** (num_tokens / REMEMBERED_TOKENS)
        self._counts = kept * self._counts + counts
        self._num_tokens = kept * self._num_tokens + num_tokens

    def likely(self, layer: int, allowed: Mask, count: int, num_tokens: int) -> npt.NDArray[np.int64]:
        """The count experts of a layer that were chosen most, of those allowed [experts], as far as
        num_tokens tokens will rather choose them than not: rising numbers."""
        candidates = np.flatnonzero(allowed)
        order = np.argsort(-self._counts[layer, candidates], kind="stable")
        best = candidates[order[:count]]
        return np.sort(best[self._chosen(self._counts[layer, best], num_tokens) >= LEAST_CHANCE])

    def num_chosen(self, num_tokens: int, allowed: Mask) -> float | None:
        """Experts that num_tokens tokens will choose in a layer, of those allowed [layers, experts], on
        average over the layers: as if each token chose for itself. None if nothing was noted."""
        if not self._num_tokens:
            return None
        chosen = self._chosen(self._counts, num_tokens)
        return float(np.where(allowed, chosen, 0.0).sum(axis=1).mean())

    def _chosen(self, counts: npt.NDArray[np.float64], num_tokens: int) -> npt.NDArray[np.float64]:
        """The chances that num_tokens tokens choose experts that were chosen so often."""
        seen = counts + PRIOR_TOKENS * self._even
        chance = np.minimum(seen / (self._num_tokens + PRIOR_TOKENS), 1.0)
        found: npt.NDArray[np.float64] = 1.0 - (1.0 - chance) ** num_tokens
        return found
