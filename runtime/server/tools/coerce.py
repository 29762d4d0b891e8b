"""Values of arguments that were written as text, read as the tool's JSON schema says."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from krasis.runtime.server.tools.calls import Call, NotJsonError, Tools, schema_of, strict_json

_INTEGER = re.compile(r"[+-]?\d{1,4000}\Z")
_MAX_LITERAL_CHARACTERS = 64 * 1024
_MAX_DEPTH = 8


def call_of_texts(
    name: str, texts: Mapping[str, str], tools: Tools, raw: str, is_text: Mapping[str, bool] | None = None
) -> Call:
    """The call whose arguments were written as texts. raw: see ``Call``. is_text: of those of which the model
    said whether they are texts or JSON."""
    schema: Any = (schema_of(tools, name) or {}).get("properties")
    known = schema if isinstance(schema, dict) else {}
    said = is_text or {}
    values = {
        key: (text if said[key] else _json_or_text(text)) if key in said else read_value(text, known.get(key))
        for key, text in texts.items()
    }
    return Call(name, json.dumps(values, ensure_ascii=False), raw)


def read_value(text: str, schema: object) -> Any:
    """The value that text stands for. schema: of this one value; None if it is not known: then it is text.

    What cannot be read as the schema asks stays text: the tool says better than anybody what is wrong.
    """
    if not isinstance(schema, Mapping):
        return text
    kinds = kinds_of(schema)
    word = text.strip()
    if not kinds:
        return _json_or_text(text)
    if "null" in kinds and word in ("null", "None"):
        return None
    for kind in ("boolean", "integer", "number", "object", "array"):
        if kind in kinds:
            found, value = _READERS[kind](word)
            if found:
                return value
    return text


def kinds_of(schema: Mapping[str, Any], depth: int = 0) -> set[str]:
    """The JSON types a schema allows; empty if it does not say."""
    if depth > _MAX_DEPTH:
        return set()
    kinds: set[str] = set()
    named = schema.get("type")
    if isinstance(named, str):
        kinds.add(named)
    elif isinstance(named, Sequence):
        kinds.update(one for one in named if isinstance(one, str))
    for key in ("anyOf", "oneOf", "allOf"):
        options = schema.get(key)
        if isinstance(options, Sequence) and not isinstance(options, str):
            for one in options:
                if isinstance(one, Mapping):
                    kinds |= kinds_of(one, depth + 1)
    if not kinds:
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if isinstance(values, Sequence) and not isinstance(values, str):
            kinds.update(_kind_of(value) for value in values)
    return kinds


def _kind_of(value: object) -> str:
    names: tuple[tuple[type, str], ...] = (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (Mapping, "object"),
        (list, "array"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "null")


def _boolean(word: str) -> tuple[bool, Any]:
    lower = word.lower()
    return lower in ("true", "false"), lower == "true"


def _integer(word: str) -> tuple[bool, Any]:
    if _INTEGER.match(word):
        return True, int(word)
    found, value = _number(word)
    whole = found and isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return whole, int(value) if whole else None


def _number(word: str) -> tuple[bool, Any]:
    if _INTEGER.match(word):
        return True, int(word)
    try:
        value = float(word)
    except ValueError:
        return False, None
    return math.isfinite(value) and "_" not in word, value


def _object(word: str) -> tuple[bool, Any]:
    value = _container(word)
    return isinstance(value, dict), value


def _array(word: str) -> tuple[bool, Any]:
    value = _container(word)
    return isinstance(value, list), value


def _container(word: str) -> Any:
    """An object or array: JSON, or as Python writes it, which some templates do."""
    try:
        return strict_json(word)
    except NotJsonError:
        pass
    if len(word) > _MAX_LITERAL_CHARACTERS or word[:1] not in ("{", "["):
        return None
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    return value if is_json(value, 0) else None


def is_json(value: object, depth: int = 0) -> bool:
    """Whether a value is what JSON can say, not too deeply nested."""
    if depth > 64:
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json(one, depth + 1) for key, one in value.items())
    if isinstance(value, list):
        return all(is_json(one, depth + 1) for one in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def _json_or_text(text: str) -> Any:
    try:
        return strict_json(text)
    except NotJsonError:
        return text


_READERS = {
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "object": _object,
    "array": _array,
}
