"""Whether guessing tokens ahead pays, by what a pass reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from krasis.runtime.planning.drafting import LEAST_GAIN, distinct_experts, draft_gain, tokens_a_pass
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.sizes import ModelSizes, sizes_of_shape


def sizes_of(name: str) -> ModelSizes:
    return sizes_of_shape(shape(name))


def test_distinct_experts_are_those_of_independent_choices() -> None:
    assert distinct_experts(64, 8, 1) == pytest.approx(8)
    assert distinct_experts(64, 8, 2) == pytest.approx(8 + 8 * (1 - 8 / 64))
    assert distinct_experts(8, 8, 5) == pytest.approx(8)


def test_tokens_of_a_pass_count_guesses_that_follow_right_ones() -> None:
    assert tokens_a_pass(1, 0.5) == 1.5
    assert tokens_a_pass(3, 0.5) == 1.875
    assert tokens_a_pass(2, 1.0) == 3.0


def test_the_gain_is_in_what_rows_share() -> None:
    """By hand, of one layer: nothing shared (experts alone) gains nothing, all shared nearly the tokens."""
    sizes = sizes_of("qwen3-235b-a22b")
    kind = sizes.layers[0]
    assert kind.experts is not None
    routed = kind.count * kind.experts.cpu_bytes * kind.experts.top_k
    two = kind.count * kind.experts.cpu_bytes * distinct_experts(kind.experts.count, kind.experts.top_k, 2)
    guess = kind.dense_bytes + routed / kind.count + sizes.end_bytes + 2 * sizes.spec.hidden**2
    expected = 1.8 * (sizes.dense_bytes + routed) / (sizes.dense_bytes + two + guess)
    assert draft_gain(sizes, 1) == pytest.approx(expected)
    only_experts = replace(sizes, end_bytes=0, layers=(replace(kind, dense_bytes=0),))
    assert draft_gain(only_experts, 1, 1.0) < 1.04
    mostly_dense = replace(sizes, layers=(replace(kind, dense_bytes=kind.dense_bytes * 1000),))
    assert draft_gain(mostly_dense, 1, 1.0) == pytest.approx(2, rel=0.05)
    assert draft_gain(sizes, 1, 0.0) < 1


def test_a_state_that_is_copied_costs() -> None:
    sizes = sizes_of("qwen3-next-80b-a3b")
    attention_alone = replace(sizes.spec, layers=sizes.spec.layers[3::4])
    assert draft_gain(sizes, 1) < draft_gain(replace(sizes, spec=attention_alone), 1)


@pytest.mark.parametrize("name", ["qwen3-next-80b-a3b", "glm-4.5-air", "deepseek-v3"])
def test_in_company_a_guess_gains_less(name: str) -> None:
    """Which is why the server guesses for one answer alone."""
    alone, two, four = (draft_gain(sizes_of(name), 1, num_answers=count) for count in (1, 2, 4))
    assert alone >= LEAST_GAIN > two > four
