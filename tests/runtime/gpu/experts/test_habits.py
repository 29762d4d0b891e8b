"""What passes before let expect of a layer's choice."""

from __future__ import annotations

import numpy as np
import pytest

from krasis.runtime.gpu.experts.habits import ExpertHabits

LAYERS, EXPERTS, TOP_K = 2, 16, 2
ALL = np.ones((LAYERS, EXPERTS), bool)


def skewed(num_tokens: int) -> np.ndarray:
    """Every token chooses expert 5 and one of the first four."""
    counts = np.zeros((LAYERS, EXPERTS), np.int32)
    counts[:, 5] = num_tokens
    counts[:, :4] = num_tokens // 4
    return counts


def test_nothing_is_known_at_first() -> None:
    habits = ExpertHabits(LAYERS, EXPERTS, TOP_K)
    assert habits.num_chosen(10, ALL) is None
    assert habits.likely(0, ALL[0], 3, 100).tolist() == [0, 1, 2]


def test_what_was_chosen_most_is_likely() -> None:
    habits = ExpertHabits(LAYERS, EXPERTS, TOP_K)
    habits.note(skewed(4000), 4000)
    assert habits.likely(1, ALL[1], 1, 100).tolist() == [5]
    assert habits.likely(1, ALL[1], 3, 100).tolist() == [0, 1, 5]
    allowed = ALL[1].copy()
    allowed[[0, 5]] = False
    assert habits.likely(1, allowed, 3, 100).tolist() == [1, 2, 3]
    assert habits.likely(1, np.zeros(EXPERTS, bool), 3, 100).size == 0


def test_what_is_rather_not_chosen_is_not_likely() -> None:
    """One token of those that have seen nothing, and one that knows: expert 5 always, others one in four."""
    habits = ExpertHabits(LAYERS, EXPERTS, TOP_K)
    assert habits.likely(0, ALL[0], 3, 1).size == 0
    habits.note(skewed(4000), 4000)
    assert habits.likely(0, ALL[0], 3, 1).tolist() == [5]
    assert habits.likely(0, ALL[0], 9, 4).tolist() == [0, 1, 2, 3, 5]


def test_how_many_will_be_chosen() -> None:
    """Five of sixteen, and hardly any other; some of them need not be copied."""
    habits = ExpertHabits(LAYERS, EXPERTS, TOP_K)
    habits.note(skewed(100_000), 100_000)
    assert habits.num_chosen(1, ALL) == pytest.approx(TOP_K, rel=1e-3)
    assert habits.num_chosen(100, ALL) == pytest.approx(5, abs=0.1)
    resident = ALL.copy()
    resident[0, 5] = resident[1, :4] = False
    assert habits.num_chosen(100, resident) == pytest.approx((4 + 1) / 2, abs=0.1)


def test_few_tokens_do_not_say_that_the_rest_is_never_chosen() -> None:
    habits = ExpertHabits(LAYERS, EXPERTS, TOP_K)
    habits.note(skewed(4), 4)
    expected = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** 20)
    assert habits.num_chosen(20, ALL) == pytest.approx(expected, rel=0.05)


def test_old_habits_fade() -> None:
    habits = ExpertHabits(LAYERS, EXPERTS, TOP_K)
    habits.note(skewed(4000), 4000)
    other = np.roll(skewed(4000), 8, axis=1)
    for _ in range(3):
        habits.note(other, 4000)
    assert habits.likely(0, ALL[0], 1, 100).tolist() == [13]
