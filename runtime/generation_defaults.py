"""What a model's files recommend for answers: ``generation_config.json`` as other programs read it.

transformers writes the file, but vLLM, SGLang and llama.cpp's converter read it too, and people write it by
hand: -1, 0 and null stand for "off", numbers come as text, and ``do_sample`` is forgotten. What has one
sensible meaning is read with a note; what has none is refused by name; what this program cannot do is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.names import shown
from krasis.runtime.settings import SamplingSettings

# Values at which a parameter does nothing, beside null. transformers, vLLM and llama.cpp differ in theirs.
_OFF: dict[str, tuple[float, ...]] = {
    "top_k": (0, -1),
    "top_p": (-1,),
    "min_p": (0, -1),
    "repetition_penalty": (0, -1),
    "presence_penalty": (),
    "frequency_penalty": (),
    "penalty_last_n": (-1,),
    "temperature": (),
}
_WHOLE = ("top_k", "penalty_last_n")
# Other names of the same thing, of llama.cpp's and other programs' files.
_ALIASES = {
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "penalty_repeat": "repetition_penalty",
    "penalty_present": "presence_penalty",
    "penalty_freq": "frequency_penalty",
    "repeat_last_n": "penalty_last_n",
}
# What changes an answer and is not done here: name -> values at which it does nothing.
_NOT_DONE: dict[str, tuple[object, ...]] = {
    "typical_p": (1, 0, -1),
    "typ_p": (1, 0, -1),
    "top_h": (1, 0),
    "top_n_sigma": (0, -1),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "sequence": (),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
}
_ORDER = "penalties, temperature, top-k, top-p, min-p"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The sampling that a model's files recommend.

    recommended: whether they say anything about sampling; if not, ``sampling`` is greedy. stops: texts that
    end an answer (``stop_strings``). notes: what was read otherwise than written, or cannot be done, a
    sentence each.
    """

    sampling: SamplingSettings = SamplingSettings()  # noqa: RUF009  frozen, so one may be shared
    recommended: bool = False
    stops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_defaults(config: Mapping[str, Any], where: str) -> GenerationDefaults:
    """``generation_config.json``'s sampling. Raises FormatError for a value that no sampler can use.

    Without ``do_sample``, tokens are drawn if any of the values says how (transformers would decode greedily;
    other programs draw); without either nothing is recommended.
    """
    reader = _Reader(where)
    known: dict[str, float] = {}
    for key, value in config.items():
        name = _ALIASES.get(key, key)
        if name in _OFF and not (name != key and config.get(name) is not None):
            number = reader.parameter(name, value)
            if number is not None:
                known[name] = number
    do_sample = reader.boolean("do_sample", config.get("do_sample"))
    shaping = {name for name in known if name in ("temperature", "top_k", "top_p", "min_p")}
    draws = do_sample if do_sample is not None else bool(shaping)
    if not draws:
        known["temperature"] = 0.0
    elif known.setdefault("temperature", 1.0) == 0.0 and do_sample:
        reader.note("temperature is 0: the most likely token is taken, although do_sample is true")
    reader.name_the_rest(config)
    try:
        sampling = SamplingSettings(
            **{name: int(value) if name in _WHOLE else value for name, value in known.items()}  # type: ignore[arg-type]
        )
    except UsageError as error:
        raise FormatError(error.what, where=where, got=error.got, limit=error.limit) from error
    return GenerationDefaults(
        sampling=sampling,
        recommended=do_sample is not None or bool(shaping),
        stops=reader.stops(config.get("stop_strings")),
        notes=tuple(reader.notes),
    )


class _Reader:
    """Reads single values and keeps the notes."""

    __slots__ = ("notes", "where")

    def __init__(self, where: str) -> None:
        self.where = where
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keeps a sentence."""
        self.notes.append(f"{self.where}: {text}")

    def parameter(self, name: str, value: object) -> float | None:
        """A sampling parameter's value; None where it is off or not given."""
        number = self.number(name, value)
        if number is None:
            return None
        if name in _WHOLE and number != int(number):
            raise FormatError(f"{name} must be a whole number", where=self.where, got=shown(value))
        if number in _OFF[name] or (name == "top_k" and number < 0):
            if number < 0 and name not in _WHOLE:
                self.note(f"{name} is {number:g}, which is read as off")
            elif number == 0 and name == "repetition_penalty":
                self.note(f"{name} is 0, which is read as off")
            return None
        if name == "top_p" and number > 1:
            self.note(f"top_p is {number:g}, more than 1, which is read as off")
            return None
        if name == "top_k" and number > 2**31 - 1:
            return None  # beyond any vocabulary: all tokens
        if name == "penalty_last_n" and number > 2**31 - 1:
            return None
        return number

    def number(self, name: str, value: object) -> float | None:
        """A finite number, also one written as text; None for null."""
        if isinstance(value, str):
            text = value.strip()
            if text.lower() in ("", "none", "null"):
                self.note(f"{name} is {shown(value)}, which is read as not set")
                return None
            try:
                number = float(text)
            except ValueError as error:
                raise FormatError(f"{name} must be a number", where=self.where, got=shown(value)) from error
            if math.isfinite(number):
                self.note(f"{name} is text, read as {number:g}")
        elif value is None:
            return None
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{name} must be a number", where=self.where, got=shown(value))
        else:
            number = float(value)
        if not math.isfinite(number):
            raise FormatError(f"{name} must be a finite number", where=self.where, got=shown(value))
        return number

    def boolean(self, name: str, value: object) -> bool | None:
        """true or false, also as text or 0 and 1; None for null."""
        if value is None or isinstance(value, bool):
            return value
        words = {"true": True, "1": True, "false": False, "0": False, "": None, "none": None, "null": None}
        text = str(value).strip().lower()
        if isinstance(value, list | dict) or text not in words:
            raise FormatError(f"{name} must be true or false", where=self.where, got=shown(value))
        found = words[text]
        self.note(f"{name} is {shown(value)}, read as {'not set' if found is None else str(found).lower()}")
        return found

    def stops(self, value: object) -> tuple[str, ...]:
        """``stop_strings``: a text or a list of them."""
        texts = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise FormatError("stop_strings must be texts", where=self.where, got=shown(value))
        return tuple(one for one in texts if one)

    def name_the_rest(self, config: Mapping[str, Any]) -> None:
        """Notes what the file asks for and this program does not do."""
        for name, off in _NOT_DONE.items():
            value = config.get(name)
            if value is None or value in off or value == [] or value == "":
                continue
            if name == "sequence":
                self.note(f"the order of samplers ({shown(value)}) is not followed; it is {_ORDER}")
            else:
                self.note(f"{name} ({shown(value)}) is not supported and has no effect")


def describe(sampling: SamplingSettings) -> str:
    """``temperature 0.6, top_k 20, top_p 0.95``: what is on; ``greedy (temperature 0)`` without drawing."""
    parts = []
    if sampling.temperature == 0:
        parts.append("greedy (temperature 0)")
    else:
        parts.append(f"temperature {sampling.temperature:g}")
        parts += [f"top_k {sampling.top_k}"] if sampling.top_k else []
        parts += [f"top_p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        parts += [f"min_p {sampling.min_p:g}"] if sampling.min_p else []
    parts += (
        [f"repetition_penalty {sampling.repetition_penalty:g}"] if sampling.repetition_penalty != 1 else []
    )
    parts += [f"presence_penalty {sampling.presence_penalty:g}"] if sampling.presence_penalty else []
    parts += [f"frequency_penalty {sampling.frequency_penalty:g}"] if sampling.frequency_penalty else []
    parts += [f"penalty_last_n {sampling.penalty_last_n}"] if sampling.penalty_last_n >= 0 else []
    return ", ".join(parts)
