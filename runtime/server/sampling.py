"""How a request wants its tokens picked, and where its answer shall end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from krasis.formats.errors import UsageError
from krasis.runtime.server.errors import refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.settings import SamplingSettings

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 4096
MAX_BIASED_TOKENS = 4096
MAX_TOP_LOGPROBS = 20
_NEVER = -1e9  # a bias after which a token is not picked
# Of OpenAI's, vLLM's and llama.cpp's names.
_NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "repetition_penalty": (0.01, 100.0),
    "repeat_penalty": (0.01, 100.0),
}
_MAX_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n_predict")


def read_sampling(fields: Fields, defaults: SamplingSettings) -> SamplingSettings:
    """The settings. defaults: the bundle's, for every field that the request leaves out."""
    given: dict[str, float] = {}
    for name, (low, high) in _NUMBERS.items():
        value = fields.number(name, low, high)
        if value is not None:
            given["repetition_penalty" if name == "repeat_penalty" else name] = value
    top_k = fields.integer("top_k", -1, 2**31 - 1)
    last_n = fields.integer("repeat_last_n", -1, 2**31 - 1)
    seed = fields.integer("seed")
    try:
        sampling = replace(defaults, **given)  # type: ignore[arg-type]
    except UsageError as error:
        raise refused(str(error)) from error
    if top_k is not None:
        sampling = replace(sampling, top_k=max(top_k, 0))
    if last_n is not None:
        sampling = replace(sampling, penalty_last_n=last_n)
    if seed is not None and seed != -1:
        sampling = replace(sampling, seed=seed % 2**64)
    return sampling


def read_max_tokens(fields: Fields, least: int = 1) -> int | None:
    """The longest answer, reasoning and all; None: to the end of the context."""
    for name in _MAX_TOKENS:
        value = fields.integer(name, None, 2**53)
        if value is None or value == -1:
            continue
        if value < least:
            raise refused(f"'{name}' must be at least {least} (got {value}).", name, "invalid_value")
        return value
    return None


def read_stops(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    """Texts that end the answer."""
    value = fields.any(name)
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise fields.wrong(name, "a string or a list of strings")
    if len(texts) > MAX_STOPS:
        raise refused(f"'{name}' may hold {MAX_STOPS} strings at most (got {len(texts)}).", name)
    if any(len(one) > MAX_STOP_CHARACTERS for one in texts):
        raise refused(f"a string of '{name}' may have {MAX_STOP_CHARACTERS} characters at most.", name)
    return tuple(one for one in texts if one)


def read_bias(
    fields: Fields, vocab_size: int, tokens_of: Callable[[str], list[int]] | None = None
) -> dict[int, float]:
    """Id -> what is added to its logit. OpenAI's object, or llama.cpp's list of pairs; false is never.
    tokens_of: gives the ids of a text, where texts may stand for them."""
    value = fields.any("logit_bias")
    if value is None:
        return {}
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 for one in value):
        pairs = [(first, second) for first, second in value]
    else:
        raise fields.wrong("logit_bias", "an object of token ids and numbers")
    if len(pairs) > MAX_BIASED_TOKENS:
        raise refused(
            f"'logit_bias' may name {MAX_BIASED_TOKENS} tokens at most (got {len(pairs)}).", "logit_bias"
        )
    found: dict[int, float] = {}
    for key, bias in pairs:
        if tokens_of is not None and isinstance(key, str) and not key.isdecimal():
            found |= dict.fromkeys(tokens_of(key[:MAX_STOP_CHARACTERS]), _bias(bias))
            continue
        if not str(key).isdecimal() or not 0 <= int(str(key)) < vocab_size or len(str(key)) > 10:
            raise refused("'logit_bias' names a token that is not in the vocabulary.", "logit_bias")
        found[int(str(key))] = _bias(bias)
    return found


def _bias(value: Any) -> float:
    if value is False:
        return _NEVER
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 <= value <= 1e9:
        raise refused("'logit_bias' must hold numbers.", "logit_bias")
    return float(value)
