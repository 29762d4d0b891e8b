"""How the core picks tokens for each request: scores, bias, masks, seeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from asking import ask, finish
from letters import END, tokens_of
from scripted_backend import ScriptedBackend, told

from krasis.runtime.serving.api import (
    Delta,
    Failed,
    PromptScores,
    Request,
)
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.steps import Limits
from krasis.runtime.settings import SamplingSettings

MakeCore = Callable[..., EngineCore]


def test_scores_of_the_prompt_and_of_the_answer(make_core: MakeCore) -> None:
    core = make_core(ScriptedBackend(told({(1, 2, 3): [5, 6]})), CoreSettings(limits=Limits(pass_rows=2)))
    finish(core, core.submit(ask([1, 2, 3])))
    (events,) = finish(core, core.submit(ask([1, 2, 3], 2, logprobs=2, prompt_logprobs=1)))
    # Every row of logits is -|id - script|: exp sums over 64 ids.
    script = told({(1, 2, 3): [5, 6]})

    def score(tokens: tuple[int, ...], token: int) -> float:
        row = -np.abs(np.arange(64) - script(tokens)).astype(float)
        return float(row[token] - np.log(np.exp(row).sum()))

    (found,) = [event for event in events if isinstance(event, PromptScores)]
    assert found.scores[0] is None
    assert [one.token for one in found.scores[1:] if one] == [2, 3]
    assert [one.logprob for one in found.scores[1:] if one] == pytest.approx(
        [score((1,), 2), score((1, 2), 3)]
    )
    assert [one.rank for one in found.scores[1:] if one] == [3, 4]
    answer = [one for event in events if (one := getattr(event, "scores", None)) and event is not found]
    assert [(one.token, one.rank) for (one,) in answer] == [(5, 1), (6, 1)]
    assert [one.logprob for (one,) in answer] == pytest.approx([score((1, 2, 3), 5), score((1, 2, 3, 5), 6)])
    assert [[token for token, _ in one.top] for (one,) in answer] == [[5, 4], [6, 5]]
    assert events[-1].usage.num_cached == 0


@pytest.mark.parametrize("is_plain", [True, False])
def test_the_end_of_a_plain_text_has_a_score_too(make_core: MakeCore, is_plain: bool) -> None:
    """Harnesses ask for one token behind a text and drop the last row: without one for the end it would be
    the text's own."""
    core = make_core(ScriptedBackend(told({(1, 2): [5, END]})))
    request = Request(id="r", prompt=[1, 2], max_tokens=4, is_plain=is_plain, logprobs=1)
    (events,) = finish(core, core.submit(request))
    found = [one for event in events if isinstance(event, Delta) for one in event.scores]
    assert [one.token for one in found] == ([5, END] if is_plain else [5])
    assert tokens_of(events) == [5]
    assert (events[-1].reason, events[-1].usage.num_generated) == ("end", 2)
    unasked = Request(id="s", prompt=[1, 2], max_tokens=4, is_plain=is_plain)
    (events,) = finish(core, core.submit(unasked))
    assert not any(event.scores for event in events if isinstance(event, Delta))


def test_bias_and_mask(make_core: MakeCore) -> None:
    class Even:
        """Even tokens only; what was picked is told."""

        def __init__(self) -> None:
            self.picked: list[int] = []

        def allowed(self) -> np.ndarray:
            return np.arange(80) % 2 == 0

        def accept(self, token: int) -> None:
            self.picked.append(token)

    core = make_core(ScriptedBackend(told({}, otherwise=7)))
    mask = Even()
    masked, biased = finish(
        core,
        core.submit(ask([1], 3, make_mask=lambda: mask)),
        core.submit(ask([2], 3, logit_bias={7: -100.0, 9: 1.5})),
    )
    assert tokens_of(masked) == mask.picked == [6, 6, 6]
    assert tokens_of(biased) == [9, 9, 9]


def test_a_mask_that_allows_nothing_is_an_error_of_its_request(make_core: MakeCore) -> None:
    class Nothing:
        def allowed(self) -> np.ndarray:
            return np.zeros(64, dtype=np.bool_)

        def accept(self, token: int) -> None: ...

    core = make_core(ScriptedBackend())
    (events,) = finish(core, core.submit(ask([1], make_mask=Nothing)))
    assert isinstance(events[-1], Failed)
    assert "allows no token" in str(events[-1].error)


def test_a_seed_gives_the_same_answer_in_any_company(make_core: MakeCore) -> None:
    sampling = SamplingSettings(temperature=3.0, seed=5)
    core = make_core(ScriptedBackend())
    (alone,) = finish(core, core.submit(ask([1, 2], 20, sampling=sampling)))
    many = finish(
        core, *(core.submit(ask([1, 2], 20, sampling=sampling)) for _ in range(2)), core.submit(ask([3], 20))
    )
    assert [tokens_of(one) for one in many[:2]] == [tokens_of(alone)] * 2


def test_scores_by_which_tokens_are_picked(make_core: MakeCore) -> None:
    core = make_core(ScriptedBackend(told({(1, 2, 3): [5, 6]})))
    sampling = SamplingSettings(temperature=0.5, top_k=3, seed=1)
    request = ask([1, 2, 3], 1, logprobs=5, sampled_logprobs=True, sampling=sampling, logit_bias={4: -50.0})
    (events,) = finish(core, core.submit(request))
    (score,) = [one for event in events if isinstance(event, Delta) for one in event.scores]
    # Rows are -|id - 5|: with 4 out of it the three largest are 5, 6 and (by id, of equals) 3.
    weights = np.exp(-np.array([0.0, 1.0, 2.0]) / 0.5)
    assert [one for one, _ in score.top] == [5, 6, 3]
    assert np.exp([value for _, value in score.top]) == pytest.approx(weights / weights.sum())
    assert (score.token, score.logprob) in score.top
    greedy = ask([1, 2, 3], 1, logprobs=5, sampled_logprobs=True)
    (events,) = finish(core, core.submit(greedy))
    assert [event.scores[0].top for event in events if isinstance(event, Delta)] == [((5, 0.0),)]
