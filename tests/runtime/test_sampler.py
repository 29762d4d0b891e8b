"""The sampler against a plain float64 implementation of the documented order, and against the law of large
numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import NativeError, UsageError
from krasis.runtime.sampler import Sampler, distribution, penalize_repetition
from krasis.runtime.settings import SamplingSettings


def plain_distribution(logits: list[float], chosen: SamplingSettings) -> dict[int, float]:
    """Written from the definition, one token at a time: temperature, top-k, top-p, min-p."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if chosen.top_k:
        order = order[: chosen.top_k]
    peak = max(logits)
    weights = {token: math.exp((logits[token] - peak) / chosen.temperature) for token in order}
    total = sum(weights.values())
    probabilities = {token: weight / total for token, weight in weights.items()}
    if chosen.top_p < 1:
        kept: dict[int, float] = {}
        for token in order:
            kept[token] = probabilities[token]
            if sum(kept.values()) >= chosen.top_p:
                break
        probabilities = kept
    best = max(probabilities.values())
    probabilities = {token: p for token, p in probabilities.items() if p >= chosen.min_p * best}
    total = sum(probabilities.values())
    return {token: p / total for token, p in probabilities.items()}


@pytest.mark.parametrize(
    "chosen",
    [
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=0.6, top_k=20, top_p=0.95),
        SamplingSettings(temperature=1.5, top_k=3),
        SamplingSettings(temperature=0.9, min_p=0.1),
        SamplingSettings(temperature=2.0, top_p=0.5, min_p=0.05),
        SamplingSettings(temperature=1.0, top_k=1),
        SamplingSettings(temperature=1.0, top_p=0.0),
        SamplingSettings(temperature=1.0, top_k=5000),
    ],
)
def test_distribution_follows_the_definition(chosen: SamplingSettings) -> None:
    logits = np.random.default_rng(7).normal(0, 3, 400).astype(np.float32)
    ids, probabilities = distribution(logits, chosen)
    expected = plain_distribution([float(one) for one in logits], chosen)
    assert set(ids.tolist()) == set(expected)
    for token, probability in zip(ids.tolist(), probabilities.tolist(), strict=True):
        assert probability == pytest.approx(expected[token], rel=1e-9)


@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=40),
    st.integers(0, 45),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_ties_go_to_the_lower_id(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    chosen = SamplingSettings(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, probabilities = distribution(np.array(values, dtype=np.float32), chosen)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    assert ids.tolist() == order[: len(ids)]
    assert probabilities.sum() == pytest.approx(1.0)


def test_draws_have_the_right_frequencies() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], dtype=np.float32))
    sampler = Sampler(SamplingSettings(temperature=1.0, seed=3))
    draws = 20_000
    counts = np.bincount([sampler.pick(logits) for _ in range(draws)], minlength=5)
    expected = np.exp(logits.astype(np.float64)) * draws
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 18.5  # 4 degrees of freedom, p = 0.001


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = np.random.default_rng(1).normal(0, 1, 1000).astype(np.float32)
    runs = []
    for seed in (5, 5, 6):
        sampler = Sampler(SamplingSettings(temperature=1.0, seed=seed))
        runs.append([sampler.pick(logits) for _ in range(50)])
    assert runs[0] == runs[1] != runs[2]


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    logits = np.array([1.0, 4.0, 4.0, 2.0], dtype=np.float32)
    assert Sampler(SamplingSettings(temperature=0.0)).pick(logits) == 1


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.0], dtype=np.float32)
    penalized = penalize_repetition(logits, [0, 1, 0, 0, 3], 2.0)
    assert penalized.tolist() == [1.0, -4.0, 1.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]
    greedy = Sampler(SamplingSettings(temperature=0.0, repetition_penalty=3.0))
    assert greedy.pick(logits, [0]) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_are_an_error(bad: float) -> None:
    with pytest.raises(NativeError, match="NaN or infinite"):
        Sampler(SamplingSettings()).pick(np.array([0.0, bad], dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 1.01),
        ("min_p", -1.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingSettings(**{name: value})
