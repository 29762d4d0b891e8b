"""How an answer is made, in llama.cpp's words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from krasis.runtime.server.ask import Ask
from krasis.runtime.settings import SamplingSettings

RANDOM_SEED = 2**32 - 1  # llama.cpp's word for none


def sampling_settings(sampling: SamplingSettings) -> dict[str, Any]:
    """How tokens are picked."""
    return {
        "seed": RANDOM_SEED if sampling.seed is None else sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_last_n": sampling.penalty_last_n,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }


def generation_settings(sampling: SamplingSettings, ask: Ask, end_tokens: Iterable[int]) -> dict[str, Any]:
    """A request's ``generation_settings``. end_tokens: which a request that ignores them never gets."""
    bias: list[dict[str, float | None]] = [
        {"token": token, "bias": value} for token, value in ask.bias.items()
    ]
    if ask.ignore_ends:
        bias += [{"token": token, "bias": None} for token in sorted(end_tokens)]
    longest = -1 if ask.max_tokens is None else ask.max_tokens
    return {
        **sampling_settings(sampling),
        "stop": list(ask.stops),
        "max_tokens": longest,
        "n_predict": longest,
        "ignore_eos": ask.ignore_ends,
        "logit_bias": bias,
        "n_probs": ask.num_logprobs or 0,
        "grammar": "" if ask.grammar is None else ask.grammar.text,
        "reasoning_format": ask.thought_form,
    }
