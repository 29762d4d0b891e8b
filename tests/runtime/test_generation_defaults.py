"""generation_config.json in the forms that transformers, vLLM, llama.cpp's converter and people write."""

from __future__ import annotations

from typing import Any

import pytest

from krasis.formats.errors import FormatError
from krasis.runtime.generation_defaults import describe, read_defaults
from krasis.runtime.settings import SamplingSettings

WHERE = "generation_config.json"


def sampling(config: dict[str, Any]) -> SamplingSettings:
    return read_defaults(config, WHERE).sampling


def test_what_transformers_writes() -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}
    found = read_defaults(config, WHERE)
    assert found.sampling == SamplingSettings(temperature=0.6, top_k=20, top_p=0.95)
    assert found.recommended
    assert found.notes == ()
    # do_sample without a temperature is transformers' default of 1; without do_sample it decodes greedily.
    assert sampling({"do_sample": True}).temperature == 1.0
    assert sampling({"do_sample": True, "temperature": None}).temperature == 1.0
    assert sampling({"do_sample": False, "temperature": 0.6}).temperature == 0.0


@pytest.mark.parametrize("config", [{}, {"eos_token_id": 5}, {"do_sample": None, "temperature": None}])
def test_without_a_recommendation_it_is_greedy_and_known_to_be_so(config: dict[str, Any]) -> None:
    found = read_defaults(config, WHERE)
    assert found.sampling.temperature == 0.0
    assert not found.recommended
    assert describe(found.sampling) == "greedy (temperature 0)"


def test_values_without_do_sample_mean_drawing() -> None:
    assert sampling({"temperature": 0.6, "top_k": 20}) == SamplingSettings(temperature=0.6, top_k=20)
    assert sampling({"top_p": 0.9}) == SamplingSettings(temperature=1.0, top_p=0.9)
    # A penalty says nothing about drawing.
    assert sampling({"repetition_penalty": 1.1}) == SamplingSettings(repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("top_k", -1, 0),
        ("top_k", 0, 0),
        ("top_k", -2, 0),
        ("top_k", None, 0),
        ("top_k", 20.0, 20),
        ("top_k", 10**12, 0),
        ("top_k", 10**9, 10**9),
        ("top_p", None, 1.0),
        ("top_p", -1, 1.0),
        ("top_p", 1.5, 1.0),
        ("top_p", 0, 0.0),
        ("min_p", -1, 0.0),
        ("min_p", None, 0.0),
        ("repetition_penalty", 0, 1.0),
        ("repetition_penalty", -1, 1.0),
        ("repetition_penalty", None, 1.0),
        ("presence_penalty", 1.5, 1.5),
        ("presence_penalty", -0.5, -0.5),
        ("frequency_penalty", 0, 0.0),
        ("penalty_last_n", 64, 64),
        ("penalty_last_n", 0, 0),
        ("penalty_last_n", -1, -1),
    ],
)
def test_off_in_every_spelling(name: str, value: object, expected: float) -> None:
    found = sampling({"do_sample": True, name: value})
    assert getattr(found, name) == expected
    assert found.temperature == 1.0


def test_numbers_as_text_are_read_with_a_note() -> None:
    found = read_defaults({"do_sample": "true", "temperature": "0.7", "top_k": " 20 ", "min_p": ""}, WHERE)
    assert found.sampling == SamplingSettings(temperature=0.7, top_k=20)
    assert len(found.notes) == 4
    assert any("temperature is text, read as 0.7" in note for note in found.notes)
    assert all(note.startswith(WHERE) for note in found.notes)


def test_temperature_zero_with_do_sample_takes_the_most_likely_and_says_so() -> None:
    found = read_defaults({"do_sample": True, "temperature": 0.0, "top_k": 1}, WHERE)
    assert found.sampling.temperature == 0.0
    assert any("temperature is 0" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.5),
        ("temperature", -1),
        ("temperature", "nan"),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", [0.7]),
        ("temperature", 1e9),
        ("temperature", float("nan")),
        ("top_k", 2.5),
        ("top_p", -0.5),
        ("top_p", {}),
        ("min_p", 1.5),
        ("repetition_penalty", -2.0),
        ("repetition_penalty", "inf"),
        ("presence_penalty", 1e6),
        ("do_sample", "perhaps"),
        ("do_sample", [True]),
        ("stop_strings", [1]),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(FormatError, match=name) as caught:
        read_defaults({"do_sample": True, name: value}, WHERE)
    assert caught.value.where == WHERE


def test_what_cannot_be_done_is_named_and_the_rest_is_ignored() -> None:
    config = {
        "do_sample": True,
        "typical_p": 0.9,
        "mirostat": 2,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.1,
        "sequence": "top_k;temperature",
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [1],
        "transformers_version": "4.51.0",
        "max_length": 20,
        "trust_remote_code": True,
    }
    notes = " | ".join(read_defaults(config, WHERE).notes)
    for name in ("typical_p", "mirostat", "xtc_probability", "num_beams", "no_repeat_ngram", "suppress"):
        assert f"{name}" in notes
    assert "order of samplers" in notes
    for name in ("transformers_version", "max_length", "xtc_threshold", "trust"):
        assert name not in notes
    off = {"typical_p": 1.0, "mirostat": 0, "num_beams": 1, "suppress_tokens": [], "penalty_alpha": None}
    assert read_defaults({"do_sample": True, **off}, WHERE).notes == ()


def test_names_of_other_programs_count_where_the_own_name_is_missing() -> None:
    found = sampling({"temp": 0.5, "repeat_penalty": 1.2, "repeat_last_n": 32})
    assert found == SamplingSettings(temperature=0.5, repetition_penalty=1.2, penalty_last_n=32)
    assert sampling({"temp": 0.5, "temperature": 0.8}).temperature == 0.8


def test_stop_strings_are_one_text_or_several() -> None:
    assert read_defaults({"stop_strings": "User:"}, WHERE).stops == ("User:",)
    assert read_defaults({"stop_strings": ["a", "", "b"]}, WHERE).stops == ("a", "b")
    assert read_defaults({"stop_strings": None}, WHERE).stops == ()


def test_the_line_names_what_is_on() -> None:
    chosen = SamplingSettings(temperature=0.6, top_k=20, top_p=0.95, presence_penalty=1.5)
    assert describe(chosen) == "temperature 0.6, top_k 20, top_p 0.95, presence_penalty 1.5"
