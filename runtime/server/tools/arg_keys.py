"""Calls as GLM-4.5 and later write them, with line breaks between the parts or without:

    <tool_call>name
    <arg_key>key</arg_key>
    <arg_value>value</arg_value>
    </tool_call>

Texts are written as they are, other values as JSON. A value may contain markers: one that ends it is known by
what follows it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from krasis.runtime.server.tools.calls import BAD, DONE, OPEN, Call, CallFormat, CallReader, Tools, schema_of
from krasis.runtime.server.tools.coerce import read_value

OPENER, CLOSER = "<tool_call>", "</tool_call>"
KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
MAX_NAME_CHARACTERS = 256
_NAME = re.compile(r"[^\s<>{}\"]+\Z")


class ArgKeyReader:
    """See ``CallReader``."""

    __slots__ = (
        *("_at", "_begin", "_key", "_name", "_step", "_text", "_tools", "_values"),
        *("call", "rest", "state"),
    )

    def __init__(self, tools: Tools = ()) -> None:
        self.state, self.rest = OPEN, ""
        self.call: Call | None = None
        self._tools = tools
        self._text = ""
        self._at = self._begin = 0  # what is before _at was read; where the value begins
        self._name = self._key = ""
        self._values: dict[str, str] = {}
        self._step = self._head

    def feed(self, text: str) -> None:
        """As ``CallReader.feed``."""
        self._text += text
        while self.state == OPEN and self._step():
            pass

    def end(self, *, truncated: bool) -> None:
        """As ``CallReader.end``: behind a value, the last marker may be missing."""
        if self.state != OPEN or truncated or self._step != self._value:
            return
        end = self._text.find(END_VALUE, self._at)
        if end >= 0 and not self._text[end + len(END_VALUE) :].strip():
            self._keep(end, end + len(END_VALUE))
            self._finish(self._at, self._text[self._at :])

    def _head(self) -> bool:
        """The name, up to the next marker."""
        if len(self._text) < len(OPENER):
            return False
        at = self._text.find("<", len(OPENER))
        name = self._text[len(OPENER) : at if at >= 0 else None].strip()
        if (name and not _NAME.match(name)) or len(name) > MAX_NAME_CHARACTERS or (at >= 0 and not name):
            self.state = BAD
        if at < 0 or self.state == BAD:
            return False
        self._name, self._at, self._step = name, at, self._next
        return True

    def _next(self) -> bool:
        """The next key, or the end of the call."""
        marker = self._marker(self._at, KEY, CLOSER)
        if marker is None:
            return False
        at = self._text.index(marker, self._at) + len(marker)
        if marker == CLOSER:
            self._finish(at, self._text[at:])
            return False
        end = self._text.find(END_KEY, at)
        if end < 0:
            self.state = BAD if len(self._text) - at > MAX_NAME_CHARACTERS + len(END_KEY) else OPEN
            return False
        self._key, self._at, self._step = self._text[at:end].strip(), end + len(END_KEY), self._before_value
        return True

    def _before_value(self) -> bool:
        if self._marker(self._at, VALUE) is None:
            return False
        self._begin = self._at = self._text.index(VALUE, self._at) + len(VALUE)
        self._step = self._value
        return True

    def _value(self) -> bool:
        """The text up to the marker that ends it."""
        while (end := self._text.find(END_VALUE, self._at)) >= 0:
            behind = end + len(END_VALUE)
            after = self._text[behind : behind + MAX_NAME_CHARACTERS].lstrip()
            if after.startswith((KEY, CLOSER)):
                self._keep(end, behind)
                return True
            if any(one.startswith(after) for one in (KEY, CLOSER)):
                self._at = end
                return False
            self._at = behind
        self._at = max(self._at, len(self._text) - len(END_VALUE) + 1)
        return False

    def _keep(self, end: int, behind: int) -> None:
        self._values[self._key] = self._text[self._begin : end]
        self._at, self._step = behind, self._next

    def _marker(self, at: int, *markers: str) -> str | None:
        """The one that comes next behind blanks; None until it is there, or if something else is."""
        body = self._text[at : at + MAX_NAME_CHARACTERS].lstrip()
        found = next((one for one in markers if body.startswith(one)), None)
        if found is None and not any(one.startswith(body) for one in markers):
            self.state = BAD
        return found

    def _finish(self, end: int, rest: str) -> None:
        schema: Any = (schema_of(self._tools, self._name) or {}).get("properties")
        known = schema if isinstance(schema, dict) else {}
        values = {key: read_value(text, known.get(key)) for key, text in self._values.items()}
        self.call = Call(self._name, json.dumps(values, ensure_ascii=False), self._text[:end])
        self.state, self.rest = DONE, rest


def _reader(tools: Tools) -> CallReader:
    return ArgKeyReader(tools)


ARG_KEYS = CallFormat("arg_keys", (OPENER,), _reader)
