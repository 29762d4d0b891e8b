"""Calls as Hermes and Qwen3 write them: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

The end of a call is where its JSON ends, so that markers inside its strings are what they are: text.
"""

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
    CallFormat,
    CallReader,
    NotJsonError,
    Tools,
    strict_json,
)

OPENER, CLOSER = "<tool_call>", "</tool_call>"
_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'[{}\[\]"]')


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


class HermesReader:
    """See ``CallReader``."""

    __slots__ = ("_end", "_head", "_pieces", "_tail", "call", "rest", "state")

    def __init__(self, tools: Tools = ()) -> None:
        self.state, self.rest = OPEN, ""
        self.call: Call | None = None
        self._head: str | None = ""  # until the object begins
        self._pieces: list[str] = []
        self._end = JsonEnd()
        self._tail: str | None = None  # what follows the object

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        if self._head is not None:
            begun = self._begin(self._head + text)
            if begun is None:
                return
            text = begun
        if self._tail is None:
            at = self._end.find(text)
            if at < 0:
                self._pieces.append(text)
                return
            self._pieces.append(text[:at])
            self._tail, text = "", text[at:]
            self._take_object()
            if self.state != OPEN:
                return
        self._close(self._tail + text)

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``."""
        del truncated  # a JSON object is whole or it is not
        if self.state == OPEN and self._tail is not None:
            self._finish("")

    def _begin(self, text: str) -> str | None:
        """Looks for the brace behind the marker; gives it and what follows, None without one."""
        self._head = text
        if len(text) < len(OPENER):
            return None
        body = text[len(OPENER) :].lstrip()
        if not body:
            return None
        if body[0] != "{":
            self.state = BAD
            return None
        self._pieces.append(text[: len(text) - len(body)])
        self._head = None
        return body

    def _take_object(self) -> None:
        """The object is complete: a call, or not."""
        written = "".join(self._pieces)
        self.call = _read_call(written[len(OPENER) :].lstrip(), written)
        if self.call is None:
            self.state = BAD

    def _close(self, tail: str) -> None:
        """Waits for the closing marker; whatever else comes instead belongs to what follows."""
        self._tail = tail
        bare = tail.lstrip()
        if bare.startswith(CLOSER):
            blanks = len(tail) - len(bare)
            self._finish(tail[: blanks + len(CLOSER)])
            self.rest = bare[len(CLOSER) :]
        elif not CLOSER.startswith(bare):
            self._finish("")
            self.rest = tail

    def _finish(self, closing: str) -> None:
        if self.call is not None:
            self.call = Call(self.call.name, self.call.arguments, self.call.raw + closing)
            self.state = DONE


def _read_call(text: str, raw: str) -> Call | None:
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
    name = value.get("name")
    key = "arguments" if "arguments" in value else "parameters"
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
    return Call(name, _as_written(text, key, arguments), raw)


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


def _reader(tools: Tools) -> CallReader:
    return HermesReader(tools)


HERMES = CallFormat("hermes", (OPENER,), _reader)
