"""The sampler against a plain float64 implementation of the documented order, and against the law of large
numbers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import NativeError, UsageError
from krasis.runtime.sampler import Sampler, distribution, draw, penalize_presence, penalize_repetition
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
        ("presence_penalty", math.inf),
        ("frequency_penalty", -101.0),
        ("penalty_last_n", -2),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingSettings(**{name: value})


def test_presence_and_frequency_follow_openais_definition() -> None:
    # mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c over the tokens sampled so far.
    logits = np.random.default_rng(5).normal(0, 3, 200).astype(np.float32)
    answer = [3, 3, 7, 199, 3, 0]
    expected = logits.astype(np.float64)
    for token in range(200):
        count = answer.count(token)
        expected[token] -= count * 0.25 + (count > 0) * 1.5
    found = penalize_presence(logits, Counter(answer), 1.5, 0.25)
    assert found == pytest.approx(expected, abs=1e-6)
    assert penalize_presence(logits, Counter(answer), 0.0, 0.0) is logits
    assert penalize_presence(logits, {}, 1.5, 0.25) is logits


def test_penalties_count_the_answer_and_repetition_the_prompt_too() -> None:
    logits = np.array([3.0, 2.9, 0.0, 0.0], dtype=np.float32)
    presence = Sampler(SamplingSettings(presence_penalty=1.0))
    assert presence.pick(logits, [0, 0], []) == 0  # the prompt's tokens do not count
    assert presence.pick(logits, [0, 0], [0]) == 1
    assert Sampler(SamplingSettings(frequency_penalty=0.06)).pick(logits, [], [0]) == 0
    assert Sampler(SamplingSettings(frequency_penalty=0.06)).pick(logits, [], [0, 0]) == 1
    assert Sampler(SamplingSettings(frequency_penalty=-1.0)).pick(logits, [], [1]) == 1
    assert Sampler(SamplingSettings(repetition_penalty=1.1)).pick(logits, [0], []) == 1
    assert logits.tolist() == [3.0, pytest.approx(2.9), 0.0, 0.0]


@given(st.lists(st.integers(0, 4), max_size=25), st.integers(-1, 6).filter(bool), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_a_growing_answer_is_counted_as_if_anew(answer: list[int], last: int, stride: int) -> None:
    logits = np.array([5.0, 4.5, 4.0, -3.0, 3.5], dtype=np.float32)
    chosen = SamplingSettings(
        presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.2, penalty_last_n=last
    )
    growing = Sampler(chosen)
    for size in range(0, len(answer) + 1, stride):
        part = answer[:size]
        seen = part if last < 0 else part[-last:]
        expected = logits.astype(np.float64)
        for token in set(seen):
            expected[token] *= 1.2 if expected[token] < 0 else 1 / 1.2
            expected[token] -= 0.7 + 0.3 * seen.count(token)
        assert growing.pick(logits, part, part) == int(np.argmax(expected.astype(np.float32)))


def test_penalties_look_back_so_far_only() -> None:
    logits = np.array([3.0, 2.9, 0.0], dtype=np.float32)

    def pick(last: int, context: list[int]) -> int:
        chosen = SamplingSettings(repetition_penalty=2.0, presence_penalty=1.0, penalty_last_n=last)
        return Sampler(chosen).pick(logits, context, context)

    assert pick(-1, [0, 2, 2]) == 1
    assert pick(3, [0, 2, 2]) == 1
    assert pick(2, [0, 2, 2]) == 0
    assert pick(0, [0, 2, 2]) == 0


@pytest.mark.parametrize(
    "chosen",
    [
        SamplingSettings(temperature=1.0, repetition_penalty=1.3),
        SamplingSettings(temperature=0.6, top_k=20, top_p=0.95),
        SamplingSettings(temperature=0.7, repetition_penalty=1.1, top_k=50, top_p=0.8, min_p=0.02),
        SamplingSettings(temperature=1.5, min_p=0.1),
        SamplingSettings(temperature=1.0, top_k=100_000),
        SamplingSettings(temperature=1.0, top_p=0.0),
    ],
)
def test_the_distribution_is_transformers(chosen: SamplingSettings) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(11).normal(0, 3, 500).astype(np.float32)
    context = [1, 5, 5, 499, 17]
    # In the order of transformers' GenerationMixin; float64, so that both see the same sums.
    steps = [process.RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty)]
    steps.append(process.TemperatureLogitsWarper(chosen.temperature))
    if chosen.top_k:
        steps.append(process.TopKLogitsWarper(chosen.top_k))
    if chosen.top_p < 1:
        steps.append(process.TopPLogitsWarper(chosen.top_p))
    if chosen.min_p:
        steps.append(process.MinPLogitsWarper(chosen.min_p))
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for step in steps:
        scores = step(torch.tensor([context]), scores)
    expected = torch.softmax(scores[0], dim=-1).numpy()
    found = np.zeros(500)
    penalized = penalize_repetition(logits, context, chosen.repetition_penalty)
    ids, probabilities = distribution(penalized, chosen)
    found[ids] = probabilities
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(expected))
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-7])
def test_a_tiny_temperature_is_no_division_by_zero(temperature: float) -> None:
    logits = np.array([1.0, 4.0, 4.0, -1000.0], dtype=np.float32)
    ids, probabilities = distribution(logits, SamplingSettings(temperature=temperature))
    assert dict(zip(ids.tolist(), probabilities.tolist(), strict=True)) == {1: 0.5, 2: 0.5, 0: 0.0, 3: 0.0}


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.01, 0.5, 1.0, 5.0, 100.0]),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.sampled_from([1, 16, 200]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_the_head_of_the_vocabulary_gives_the_token_that_all_of_it_gives(
    seed: int, temperature: float, top_p: float, min_p: float, head: int, with_ties: bool
) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(300) * 4).astype(np.float32)
    if with_ties:
        logits = np.round(logits)
    chosen = SamplingSettings(temperature=temperature, top_p=top_p, min_p=min_p)
    ids, probabilities = distribution(logits, chosen)
    sums = np.cumsum(probabilities)
    for chance in (*random.random(5), 0.0, np.nextafter(1.0, 0.0)):
        if np.abs(sums[:-1] - chance).min(initial=1.0) < 1e-12:
            continue  # on the border between two tokens rounding decides
        expected = int(ids[min(int(np.searchsorted(sums, chance, side="right")), len(ids) - 1)])
        assert draw(logits, chosen, float(chance), head) == expected


def test_a_large_vocabulary_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (np.random.default_rng(1).standard_normal(100_000) * 4).astype(np.float32)
    monkeypatch.setattr("krasis.runtime.sampler.distribution", None)  # what sorts all of it
    for chosen in (SamplingSettings(temperature=0.7, top_p=0.9), SamplingSettings(temperature=0.5)):
        sampler = Sampler(replace(chosen, seed=1))
        assert len({sampler.pick(logits) for _ in range(20)}) > 1
