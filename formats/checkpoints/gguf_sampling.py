"""The sampling that a GGUF recommends (``general.sampling.*``), in the words of ``generation_config.json``.

llama.cpp knows no ``do_sample``: a file that names a temperature or a limit on the tokens to draw from means
that tokens are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from krasis.formats.errors import FormatError

PREFIX = "general.sampling."
# llama.cpp's names -> Hugging Face's; names they share, or that only llama.cpp knows, stay as they are.
_NAMES = {
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
    "penalty_present": "presence_penalty",
    "penalty_freq": "frequency_penalty",
    "typ_p": "typical_p",
}
_DRAWING = frozenset(["temperature", "top_k", "top_p", "min_p", "typical_p"])
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_MAX_SINGLE = 3e38
LLAMA_LAST_N = 64  # tokens that llama.cpp's penalties look back at where a file does not say


def sampling_config(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every ``general.sampling.*`` key, also what no sampler of ours does: the reader names that. Empty
    without any. where: the file, for messages.

    Raises FormatError for a number that is not finite, and for what is neither number nor text.
    """
    config: dict[str, Any] = {}
    for key in sorted(metadata):
        name = key.removeprefix(PREFIX)
        if name == key or not name:
            continue
        config[_NAMES.get(name, name)] = _plain(metadata[key], f"{where}: {key}")
    if _is_greedy(config.get("temperature")):
        config |= {"temperature": 0.0, "do_sample": False}
    elif _DRAWING & config.keys():
        config.setdefault("do_sample", True)
    if any(name in config for name in _PENALTIES):
        config.setdefault("penalty_last_n", LLAMA_LAST_N)
    return config


def _is_greedy(temperature: object) -> bool:
    """llama.cpp takes the most likely token at 0 and below."""
    return isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature <= 0


def _plain(value: Any, where: str) -> Any:
    """A float32 as the shortest number that is the same one: 0.6, not 0.6000000238418579. Texts in a list are
    joined as llama.cpp writes the order of samplers."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ";".join(value)
    if not isinstance(value, str | int | float):
        raise FormatError("metadata must be a number or text", where=where, got=type(value).__name__)
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise FormatError("metadata must be a finite number", where=where, got=value)
    single = np.float32(value) if abs(value) < _MAX_SINGLE else None
    return float(str(single)) if single is not None and float(single) == value else value
