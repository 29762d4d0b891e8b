"""The sampling that a GGUF recommends, in the words of generation_config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from krasis.formats.checkpoints.gguf_sampling import sampling_config
from krasis.formats.errors import FormatError


def single(value: float) -> float:
    """As the gguf package reads a float32."""
    return float(np.float32(value))


def sampling(**keys: Any) -> dict[str, Any]:
    return sampling_config({f"general.sampling.{name}": value for name, value in keys.items()}, "m.gguf")


def test_a_temperature_means_that_tokens_are_drawn() -> None:
    found = sampling(temp=single(0.6), top_k=20, top_p=single(0.95), min_p=0.0)
    assert found == {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}
    assert sampling(top_k=20) == {"do_sample": True, "top_k": 20}


def test_nothing_is_said_where_the_file_says_nothing() -> None:
    assert sampling_config({"general.name": "x", "general.sampling": 1}, "m.gguf") == {}


def test_penalties_look_back_as_far_as_in_llama_cpp() -> None:
    # Penalties alone do not mean drawing: they work on the most likely token, too.
    assert sampling(penalty_repeat=single(1.1)) == {"repetition_penalty": 1.1, "penalty_last_n": 64}
    assert sampling(penalty_repeat=single(1.1), penalty_last_n=-1)["penalty_last_n"] == -1
    found = sampling(penalty_present=1.5, penalty_freq=0.5, penalty_last_n=256)
    assert found == {"presence_penalty": 1.5, "frequency_penalty": 0.5, "penalty_last_n": 256}


def test_what_no_sampler_here_does_is_kept_for_the_note() -> None:
    given = {"mirostat": 2, "mirostat_tau": 5.0, "xtc_probability": 0.5, "sequence": "top_k;temperature"}
    assert sampling(**given) == given
    assert sampling(typ_p=0.5) == {"typical_p": 0.5, "do_sample": True}


def test_at_zero_and_below_llama_cpp_takes_the_most_likely() -> None:
    for value in (0, 0.0, -1.0):
        assert sampling(temp=value, top_k=20) == {"temperature": 0.0, "do_sample": False, "top_k": 20}


def test_texts_in_a_list_are_one_text_and_other_lists_are_refused() -> None:
    assert sampling(sequence=["top_k", "temperature"]) == {"sequence": "top_k;temperature"}
    with pytest.raises(FormatError, match=r"general\.sampling\.top_k"):
        sampling(top_k=[1, 2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused_by_name(value: float) -> None:
    with pytest.raises(FormatError, match=r"general\.sampling\.temp"):
        sampling(temp=value)
