"""Hostile chat templates and tokenizers: each is refused in one sentence, or is harmless, within bounds."""

from __future__ import annotations

import pytest

from krasis.runtime.text import sandbox
from tests.fuzz.support import mutations
from tests.hostile.support import hostile_templates, hostile_tokenizers, text_trials

# Requests may spend 0.5 s of CPU; a machine that runs other tests beside this one takes longer by the clock.
MAX_SECONDS = 12.0
MAX_EXTRA_BYTES = 512 << 20
SEED = 20261130
EVERY = 19  # of the files, in the quick run


def templates() -> dict[str, str]:
    return hostile_templates.named_templates() | hostile_templates.random_templates(40, SEED)


def tokenizers() -> dict[str, bytes]:
    return hostile_tokenizers.named_tokenizers() | hostile_tokenizers.random_tokenizers(
        60, SEED, mutations.mutate_json
    )


def check(trial: text_trials.Trial) -> None:
    assert trial.seconds < MAX_SECONDS, trial
    assert trial.extra_bytes < MAX_EXTRA_BYTES, trial
    assert trial.sentence.isprintable(), trial
    assert len(trial.sentence) < 1500, trial


@pytest.mark.parametrize("name", list(templates())[::EVERY])
def test_some_templates(name: str) -> None:
    check(text_trials.try_template(name, templates()[name]))


@pytest.mark.parametrize("name", list(tokenizers())[::EVERY])
def test_some_tokenizers(name: str) -> None:
    check(text_trials.try_tokenizer(name, tokenizers()[name]))


def test_there_are_enough() -> None:
    assert len(templates()) >= 150
    assert len(tokenizers()) >= 150


@pytest.fixture
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests may spend a third of the time: what is made to run for ever takes all of it, each time."""
    monkeypatch.setattr(sandbox, "_SECONDS", sandbox._SECONDS / 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_templates(little_time: None) -> None:
    for name, source in templates().items():
        check(text_trials.try_template(name, source))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_tokenizers(little_time: None) -> None:
    for name, data in tokenizers().items():
        check(text_trials.try_tokenizer(name, data))
