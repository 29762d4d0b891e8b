"""What the comparison with llama.cpp calls equal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from krasis.formats.models.family import Family
from krasis.formats.models.registry import family_of_model_type
from scripts.outside.llama_cpp_greedy import LIMIT, TIE, compare, document, readable

TOKENS, VOCAB = 6, 50


def logits() -> np.ndarray:
    """Decided: the largest is 5 standard deviations above the others, token i's at i."""
    values = np.random.default_rng(0).standard_normal((TOKENS, VOCAB)).clip(-2, 2).astype(np.float32)
    values[np.arange(TOKENS), np.arange(TOKENS)] = 7
    return values


def test_rounding_is_equal() -> None:
    theirs = logits()
    ours = theirs + 0.005 * np.random.default_rng(1).standard_normal(theirs.shape)
    found = compare("x", range(TOKENS), ours, theirs)
    assert found.is_equal
    assert (found.equal_text, found.equal_choices) == (TOKENS, TOKENS)
    assert 0.001 < found.difference < LIMIT
    assert found.margin == 0


def test_a_tie_parts_texts_and_decides_nothing() -> None:
    theirs = logits()
    theirs[3, 40] = theirs[3, 3] - 0.01
    ours = theirs.copy()
    ours[3, 40] += 0.02
    found = compare("x", [0, 1, 2, 40, 9, 9], ours, theirs)
    assert (found.equal_text, found.equal_choices) == (3, TOKENS - 1)
    assert 0 < found.margin < TIE
    assert found.is_equal


def test_another_choice_is_not_equal() -> None:
    theirs = logits()
    ours = theirs.copy()
    ours[3, 40] = 9
    found = compare("x", [0, 1, 2, 40, 9, 9], ours, theirs)
    assert found.margin > 1
    assert not found.is_equal
    assert "3 of 6 | 5 of 6" in document([found], TOKENS)


def test_logits_of_another_model_are_not_equal() -> None:
    theirs = logits()
    found = compare("x", range(TOKENS), theirs * 1.1, theirs)
    assert found.equal_choices == TOKENS
    assert not found.is_equal


def test_families_without_a_reader_of_ggufs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> Family | None:
        family = family_of_model_type(name)
        return replace(family, spec_from_gguf=None) if family is not None and name == "olmoe" else family

    monkeypatch.setattr("scripts.outside.llama_cpp_greedy.family_of_model_type", found)
    names = readable()
    assert "gpt_oss" in names
    assert "olmoe" not in names
