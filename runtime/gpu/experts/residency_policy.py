"""Which experts deserve a place in VRAM: how often each is routed to, and the swaps that justifies. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import UsageError

HALF_LIFE_TOKENS = 256
SIGNIFICANCE = 2.0

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


class Frequencies:
    """How often a token is routed to each expert, as an exponentially decaying mean over tokens.

    values f64 [experts]: uses per token. effective_tokens: of how many tokens a plain mean would be as
    certain.
    """

    __slots__ = ("_half_life", "_sums", "_variance", "_weight")

    def __init__(self, num_experts: int, half_life_tokens: float = HALF_LIFE_TOKENS) -> None:
        if num_experts < 1 or not half_life_tokens > 0:
            raise UsageError("out of range", where="Frequencies", got=(num_experts, half_life_tokens))
        self._half_life = half_life_tokens
        self._sums = np.zeros(num_experts)
        self._weight = 0.0
        self._variance = 0.0

    @property
    def values(self) -> Floats:
        """Estimates; zeros before anything was seen."""
        return self._sums / self._weight if self._weight else self._sums.copy()

    @property
    def effective_tokens(self) -> float:
        """See the class."""
        return self._weight**2 / self._variance if self._variance else 0.0

    def add(self, counts: npt.NDArray[Any], num_tokens: int) -> None:
        """Sees num_tokens tokens, of which counts [experts] were routed to each expert."""
        if num_tokens < 1:
            return
        keep = 0.5 ** (num_tokens / self._half_life)
        self._sums = keep * self._sums + (1 - keep) / num_tokens * counts
        self._weight = keep * self._weight + (1 - keep)
        self._variance = keep**2 * self._variance + (1 - keep) ** 2 / num_tokens


@dataclass(frozen=True, slots=True)
class Swap:
    """newcomer gets a place: victim's, or a free one (None)."""

    victim: int | None
    newcomer: int


def plan_swaps(
    frequencies: Frequencies,
    resident: Mask,
    movable: Mask,
    allowed: Mask,
    num_free: int,
    max_swaps: int,
    significance: float = SIGNIFICANCE,
) -> list[Swap]:
    """At most max_swaps swaps, the most useful first.

    resident [experts]: have a place, or are on their way to one. movable: of these, may lose it. allowed: may
    get one. A free place goes to any expert ever used. A place changes hands only if the newcomer's frequency
    f exceeds the victim's v by more than chance explains: counts of n tokens are Poisson to first order, so f
    - v has a standard deviation of sqrt((f + v) / n), of which ``significance`` times is asked for. That is
    what keeps experts of equal worth from changing places for ever.
    """
    values, tokens = frequencies.values, frequencies.effective_tokens
    if tokens == 0 or max_swaps < 1:
        return []
    newcomers = _best(values, allowed & ~resident, max_swaps)
    victims = _best(-values, resident & movable, max_swaps)
    swaps: list[Swap] = []
    for newcomer in newcomers:
        wanted = values[newcomer]
        if wanted <= 0:
            break
        if num_free > 0:
            num_free -= 1
            swaps.append(Swap(None, newcomer))
            continue
        if not victims:
            break
        given = values[victims[0]]
        if wanted - given <= significance * np.sqrt((wanted + given) / tokens):
            break
        swaps.append(Swap(victims.pop(0), newcomer))
    return swaps


def _best(values: Floats, among: Mask, count: int) -> list[int]:
    """Indices of the count largest values among some, largest first; ties: lower index first."""
    found = np.flatnonzero(among)
    if len(found) > 4 * count:
        threshold = np.partition(values[found], len(found) - count)[len(found) - count]
        found = found[values[found] >= threshold]
    order = np.argsort(-values[found], kind="stable")[:count]
    return [int(index) for index in found[order]]
