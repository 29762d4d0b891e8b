"""Calls that are JSON objects: where one ends, and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from krasis.runtime.server.tools.calls import (
    BAD,
    DONE,
    OPEN,
    Call,
    NotJsonError,
    Tools,
    function_of,
    strict_json,
)

_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'[{}\[\]"]')
_NAMES = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters")


class JsonEnd:
    """Finds the end of one JSON object in text that comes in pieces, looking at each character once."""

    __slots__ = ("_depth", "_escaped", "_in_string")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int:
        """Behind the object's last brace, -1 if it is not in this piece."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _OUTSIDE).search(text, at)
            if found is None:
                return -1
            at = found.end()
            sign = found.group()
            if sign == "\\":
                self._escaped = True
            elif sign == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if sign in "{[" else -1
                if self._depth <= 0:
                    return at
        return -1


class ObjectReader:
    """See ``CallReader``. It begins at the brace. names: what a call must be of, if only such are calls."""

    __slots__ = ("_end", "_names", "_pieces", "calls", "rest", "state")

    def __init__(self, names: frozenset[str] | None = None) -> None:
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._names = names
        self._pieces: list[str] = []
        self._end = JsonEnd()

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        at = self._end.find(text)
        self._pieces.append(text if at < 0 else text[:at])
        if at < 0:
            return
        written = "".join(self._pieces)
        call = read_call(written, written)
        if call is None or (self._names is not None and call.name not in self._names):
            self.state = BAD
            return
        self.calls.append(call)
        self.state, self.rest = DONE, text[at:]

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``."""
        del truncated  # a JSON object is whole or it is not


def names_of(tools: Tools) -> frozenset[str]:
    """The tools' names."""
    return frozenset(str(function_of(tool).get("name")) for tool in tools)


def read_call(text: str, raw: str) -> Call | None:
    """The call that an object is; None if it is none."""
    try:
        value = strict_json(text)
    except NotJsonError:
        return None
    if not isinstance(value, Mapping):
        return None
    inner = value.get("function")
    if isinstance(inner, Mapping):
        value = inner
    name = next((value[one] for one in _NAMES if one in value), None)
    key = next((one for one in _ARGUMENTS if one in value), "")
    arguments = value.get(key)
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = strict_json(arguments)
        except NotJsonError:
            return None
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, Mapping):
        return None
    return Call(name, _as_written(text, key, arguments), raw, _own_id(value))


def _own_id(value: Mapping[str, Any]) -> str:
    own = value.get("id", value.get("tool_call_id", ""))
    return own if isinstance(own, str) else ""


def _as_written(text: str, key: str, arguments: Mapping[str, Any]) -> str:
    """The arguments' own text, so that a client that sends it back unchanged changes nothing."""
    found = re.search(rf'"{key}"\s*:\s*(?=\{{)', text)
    if found is not None:
        try:
            value, end = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            value, end = None, 0
        written = text[found.end() : end]
        if value == arguments and len(_all_keys(written)) == _count_keys(arguments):
            return written
    return json.dumps(arguments, ensure_ascii=False)


def _all_keys(text: str) -> list[str]:
    """Every key of every object, those that are given twice among them."""
    keys: list[str] = []

    def take(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys.extend(key for key, _ in pairs)
        return dict(pairs)

    json.loads(text, object_pairs_hook=take)
    return keys


def _count_keys(value: object) -> int:
    if isinstance(value, Mapping):
        return len(value) + sum(_count_keys(one) for one in value.values())
    if isinstance(value, list):
        return sum(_count_keys(one) for one in value)
    return 0
