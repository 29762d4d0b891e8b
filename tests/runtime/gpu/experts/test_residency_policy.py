"""Which experts get a place in VRAM: hit rates against the best choice that never changes, and how often it
changes."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.gpu.experts.residency_policy import Frequencies, Swap, plan_swaps

NUM_EXPERTS, TOP_K, NUM_PLACES = 256, 8, 64


def zipf(random: np.random.Generator, exponent: float) -> np.ndarray:
    """Chances of experts, skewed, in random order."""
    weights = 1.0 / np.arange(1, NUM_EXPERTS + 1) ** exponent
    return random.permutation(weights / weights.sum())


def draw(random: np.random.Generator, chances: np.ndarray, num_tokens: int) -> np.ndarray:
    """ids [num_tokens, TOP_K] without repetition, by Gumbel noise."""
    noise = random.gumbel(size=(num_tokens, NUM_EXPERTS))
    return np.argpartition(-(np.log(chances) + noise), TOP_K, axis=1)[:, :TOP_K]


def best_static_rate(ids: np.ndarray) -> float:
    """Share of routed slots that the best fixed set of experts would serve, known in hindsight."""
    counts = np.bincount(ids.reshape(-1), minlength=NUM_EXPERTS)
    return float(np.sort(counts)[-NUM_PLACES:].sum() / ids.size)


def simulate(
    ids: np.ndarray, frequencies: Frequencies, max_swaps: int = 4, every: int = 16
) -> tuple[np.ndarray, int]:
    """Tokens one by one, looked at in bunches as the runtime does. (hits [tokens], places that changed
    hands)."""
    resident = np.zeros(NUM_EXPERTS, bool)
    allowed = np.ones(NUM_EXPERTS, bool)
    hits, num_swaps = [], 0
    for begin in range(0, len(ids), every):
        bunch = ids[begin : begin + every]
        hits.extend(resident[bunch].sum(axis=1))
        frequencies.add(np.bincount(bunch.reshape(-1), minlength=NUM_EXPERTS), len(bunch))
        free = NUM_PLACES - int(resident.sum())
        for swap in plan_swaps(frequencies, resident, resident, allowed, free, free + max_swaps):
            resident[swap.newcomer] = True
            if swap.victim is not None:
                resident[swap.victim] = False
                num_swaps += 1
        assert resident.sum() <= NUM_PLACES
    return np.array(hits) / TOP_K, num_swaps


@pytest.mark.parametrize("exponent", [0.4, 0.8, 1.2])
def test_a_steady_preference_is_found_and_kept(exponent: float) -> None:
    random = np.random.default_rng(1)
    chances = zipf(random, exponent)
    frequencies = Frequencies(NUM_EXPERTS)
    prompt, answer = draw(random, chances, 4000), draw(random, chances, 3000)
    frequencies.add(np.bincount(prompt.reshape(-1), minlength=NUM_EXPERTS), len(prompt))
    hits, num_swaps = simulate(answer, frequencies)
    assert hits[16:].mean() > 0.97 * best_static_rate(answer)
    assert num_swaps < 150  # noise alone moves few: 188 bunches could have moved four each


def test_without_a_prompt_it_learns_as_it_goes() -> None:
    random = np.random.default_rng(2)
    ids = draw(random, zipf(random, 1.0), 4000)
    hits, _ = simulate(ids, Frequencies(NUM_EXPERTS))
    assert hits[1000:].mean() > 0.97 * best_static_rate(ids[1000:])


def test_a_drifting_preference_is_followed() -> None:
    """The subject changes twice: what was best for all of it in hindsight is beaten."""
    random = np.random.default_rng(3)
    parts = [draw(random, zipf(random, 1.0), 4000) for _ in range(3)]
    ids = np.concatenate(parts)
    frequencies = Frequencies(NUM_EXPERTS)
    hits, num_swaps = simulate(ids, frequencies)
    assert hits.mean() > best_static_rate(ids) + 0.07
    for index, part in enumerate(parts):
        settled = hits[4000 * index + 2500 : 4000 * (index + 1)]
        assert settled.mean() > 0.97 * best_static_rate(part)
    assert num_swaps < 4 * NUM_PLACES


def test_no_preference_moves_nothing() -> None:
    random = np.random.default_rng(4)
    ids = draw(random, np.full(NUM_EXPERTS, 1 / NUM_EXPERTS), 6000)
    _, num_swaps = simulate(ids, Frequencies(NUM_EXPERTS))
    assert num_swaps < 375  # of 1500 that were possible: one bunch in a while looks like more than chance


def test_means_and_their_certainty() -> None:
    frequencies = Frequencies(3, half_life_tokens=100)
    assert frequencies.effective_tokens == 0
    frequencies.add(np.array([10, 5, 0]), 10)
    assert frequencies.values == pytest.approx([1.0, 0.5, 0.0])
    assert frequencies.effective_tokens == pytest.approx(10)
    frequencies.add(np.array([0, 100, 0]), 100)  # half of what was known is forgotten
    before = 1 - 0.5**0.1
    expected = (0.5 * before * np.array([1.0, 0.5, 0.0]) + 0.5 * np.array([0.0, 1.0, 0.0])) / (
        0.5 * before + 0.5
    )
    assert frequencies.values == pytest.approx(expected)
    one = np.array([1, 0, 0])
    for _ in range(3000):
        frequencies.add(one, 1)
    keep = 0.5**0.01
    assert frequencies.effective_tokens == pytest.approx((1 + keep) / (1 - keep), rel=1e-3)
    frequencies.add(one, 0)
    assert frequencies.values == pytest.approx([1, 0, 0], abs=1e-6)


def known(values: list[float], num_tokens: int = 10**6) -> Frequencies:
    frequencies = Frequencies(len(values), half_life_tokens=1)
    frequencies.add(np.array(values) * num_tokens, num_tokens)
    return frequencies


def mask(*indices: int) -> np.ndarray:
    return np.isin(np.arange(6), indices)


def test_swaps_one_by_one() -> None:
    frequencies = known([0.1, 0.2, 0.3, 0.4, 0.5, 0.0])
    everything = np.ones(6, bool)

    def plan(
        resident: np.ndarray, movable: np.ndarray, allowed: np.ndarray, free: int, most: int
    ) -> list[Swap]:
        return plan_swaps(frequencies, resident, movable, allowed, free, most)

    assert plan(mask(), mask(), everything, 2, 9) == [Swap(None, 4), Swap(None, 3)]
    assert plan(mask(), mask(), everything, 9, 9) == [Swap(None, i) for i in (4, 3, 2, 1, 0)]
    assert plan(mask(0, 1), mask(0, 1), everything, 0, 9) == [Swap(0, 4), Swap(1, 3)]
    assert plan(mask(0, 1), mask(0, 1), everything, 0, 1) == [Swap(0, 4)]
    assert plan(mask(0, 1), mask(0, 1), everything, 1, 9) == [Swap(None, 4), Swap(0, 3), Swap(1, 2)]
    assert plan(mask(0, 1), mask(1), everything, 0, 9) == [Swap(1, 4)]  # 0 is on its way
    assert plan(mask(0, 1), mask(0, 1), mask(0, 1, 2), 0, 9) == [Swap(0, 2)]  # others belong to another rank
    assert plan(mask(3, 4), mask(3, 4), everything, 0, 9) == []
    assert plan(mask(), mask(), everything, 2, 0) == []
    assert plan_swaps(Frequencies(6), mask(), mask(), everything, 2, 9) == []


def test_a_difference_that_chance_explains_moves_nothing() -> None:
    everything, resident = np.ones(2, bool), np.array([True, False])
    for num_tokens, moves in ((100, False), (100_000, True)):
        swaps = plan_swaps(known([0.10, 0.12], num_tokens), resident, resident, everything, 0, 4)
        assert bool(swaps) == moves


def test_refusals() -> None:
    with pytest.raises(UsageError):
        Frequencies(0)
    with pytest.raises(UsageError):
        Frequencies(4, half_life_tokens=0)
