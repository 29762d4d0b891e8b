"""Calls as Gemma 4 writes them: ``<|tool_call>call:name{key:<|"|>text<|"|>,other:[1,true]}<tool_call|>``.

Texts stand between marks that no text contains; keys are bare at the outermost level and below it bare or
between the same marks; everything else is JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, NotJsonError, Tools, strict_json

OPENER, CLOSER, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
MAX_DEPTH = 64
_HEAD = re.compile(r"<\|tool_call>\s*call:(?P<name>[^\s<>{}\"]{1,256})\s*\{")
_PLAIN = re.compile(r"[^,\[\]{}<\s]+")
_KEY = re.compile(r"[^:,{}\[\]<]{1,256}(?=:)")


class GemmaReader:
    """See ``CallReader``."""

    __slots__ = ("_at", "_counted", "_num_quotes", "_text", "calls", "rest", "state")

    def __init__(self, tools: Tools = ()) -> None:
        del tools  # every value says what it is
        self.state, self.rest = OPEN, ""
        self.calls: list[Call] = []
        self._text = ""
        self._at = self._counted = 0  # what was looked through for the end, and for quotes
        self._num_quotes = 0

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        self._text += text
        if not self._at and not self._begin():
            return
        while (end := self._text.find(CLOSER, self._at)) >= 0:
            # Within a text the marker is text: an odd number of quotes comes before it.
            self._num_quotes += self._text.count(QUOTE, self._counted, end)
            self._counted = end
            if self._num_quotes % 2:
                self._at = end + len(CLOSER)
                continue
            self._finish(end, end + len(CLOSER))
            return
        self._at = max(self._at, len(self._text) - len(CLOSER) + 1)

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``: the last marker may be missing."""
        if self.state == OPEN and not truncated and self._text.rstrip().endswith("}"):
            self._finish(len(self._text.rstrip()), len(self._text))

    def _begin(self) -> bool:
        found = _HEAD.match(self._text)
        if found is not None:
            self._at = found.end()
            return True
        body = self._text[len(OPENER) :].lstrip()
        if len(body) > 256 + 64 or "{" in body or not ("call:".startswith(body[:5])):
            self.state = BAD
        return False

    def _finish(self, end: int, behind: int) -> None:
        found = _HEAD.match(self._text)
        body = self._text[:end].rstrip()
        if found is None or not body.endswith("}"):
            self.state = BAD
            return
        try:
            value, at = _read_object(body, found.end() - 1, 0)
        except (NotJsonError, IndexError):
            value, at = {}, -1
        if at != len(body):
            self.state = BAD
            return
        self.calls.append(Call(found["name"], json.dumps(value, ensure_ascii=False), self._text[:behind]))
        self.state, self.rest = DONE, self._text[behind:]


def _read_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """(value, the place behind it). Raises NotJsonError."""
    if depth > MAX_DEPTH:
        raise NotJsonError("nested too deeply")
    if text.startswith(QUOTE, at):
        return _read_text(text, at)
    if text[at] == "{":
        return _read_object(text, at, depth)
    if text[at] == "[":
        return _read_list(text, at, depth)
    found = _PLAIN.match(text, at)
    if found is None:
        raise NotJsonError("no value")
    word = {"True": "true", "False": "false", "None": "null"}.get(found.group(), found.group())
    return strict_json(word), found.end()


def _read_text(text: str, at: int) -> tuple[str, int]:
    end = text.find(QUOTE, at + len(QUOTE))
    if end < 0:
        raise NotJsonError("a text does not end")
    return text[at + len(QUOTE) : end], end + len(QUOTE)


def _read_object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    values: dict[str, Any] = {}
    at = _blanks(text, at + 1)
    while text[at] != "}":
        if text.startswith(QUOTE, at):
            key, at = _read_text(text, at)
        else:
            found = _KEY.match(text, at)
            if found is None:
                raise NotJsonError("no key")
            key, at = found.group().strip(), found.end()
        at = _blanks(text, at)
        if text[at] != ":":
            raise NotJsonError("no colon")
        values[key], at = _read_value(text, _blanks(text, at + 1), depth + 1)
        at = _behind_comma(text, at, "}")
    return values, at + 1


def _read_list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    values: list[Any] = []
    at = _blanks(text, at + 1)
    while text[at] != "]":
        value, at = _read_value(text, at, depth + 1)
        values.append(value)
        at = _behind_comma(text, at, "]")
    return values, at + 1


def _behind_comma(text: str, at: int, closes: str) -> int:
    at = _blanks(text, at)
    if text[at] == ",":
        return _blanks(text, at + 1)
    if text[at] != closes:
        raise NotJsonError("no comma")
    return at


def _blanks(text: str, at: int) -> int:
    while text[at].isspace():
        at += 1
    return at
